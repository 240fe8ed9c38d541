"""Your own training loop with FisherRecorder: find the examples with wrong labels.

    python examples/own_loop.py

A network that has learned a task has small gradients for most examples. The examples whose gradients stay large are
hard or wrongly labelled. FisherRecorder gives the squared gradient of every example of a batch from one backward pass,
next to ordinary training. The data are scikit-learn's handwritten digits, with 30 labels replaced by wrong ones.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from t2v_fast import FisherRecorder

WRONG = 30  # labels


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images[:1000], dtype=torch.float32)[:, None] / 16  # [N, 1, 8, 8]
    labels = torch.tensor(digits.target[:1000])  # [N]
    wrong = torch.randperm(len(labels))[:WRONG]
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (WRONG,))) % 10

    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    norms = torch.zeros(len(labels), dtype=torch.float64)  # squared gradient norm of each example, in the last epoch

    # "tensor": for each parameter and example one number, the mean of the squared gradient over the parameter.
    with FisherRecorder(model, granularity="tensor") as recorder:
        for _ in range(8):
            for batch in torch.randperm(len(labels)).split(100):
                logits = model(images[batch])  # [N, C]
                loss = nn.functional.cross_entropy(logits, labels[batch], reduction="sum")

                # The cotangent is the gradient with respect to the logits of what is squared: here, of the loss.
                (cotangent,) = torch.autograd.grad(loss, logits, retain_graph=True)
                squares = recorder.backward(logits, cotangent, retain_graph=True)  # {name: [N]}
                norms[batch] = sum(q.double() * sizes[name] for name, q in squares.items())

                # The ordinary step, through the same graph.
                optimizer.zero_grad()
                (loss / len(batch)).backward()
                optimizer.step()

    suspects = norms.argsort(descending=True)[:WRONG]
    found = int(torch.isin(suspects, wrong).sum())
    print(f"of the {WRONG} examples with the largest gradients, {found} have a wrong label")

    # The recorder's numbers are those of plain autograd, one example at a time.
    example = int(suspects[0])
    with FisherRecorder(model, granularity="tensor") as recorder:
        logits = model(images[example : example + 2])
        loss = nn.functional.cross_entropy(logits, labels[example : example + 2], reduction="sum")
        (cotangent,) = torch.autograd.grad(loss, logits, retain_graph=True)
        squares = recorder.backward(logits, cotangent)
    fast = sum(q[0] * sizes[name] for name, q in squares.items())
    alone = nn.functional.cross_entropy(model(images[example : example + 1]), labels[example : example + 1])
    gradients = torch.autograd.grad(alone, list(model.parameters()))
    plain = torch.stack([g.square().sum() for g in gradients]).sum()
    print(f"squared gradient norm of the first: {fast:.4g}, by plain autograd {plain:.4g}")


if __name__ == "__main__":
    main()
