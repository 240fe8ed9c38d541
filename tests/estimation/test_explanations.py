"""Errors of a network's forward pass that its inputs explain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from t2v_fast import fisher
from t2v_fast.adapters.fim import fim_diag
from t2v_fast.adapters.language import embed_text

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(15).reshape(3, 5) % 10


class Words(nn.Module):
    """A language model of ten words and texts of at most six."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.places = nn.Embedding(10, 8), nn.Embedding(6, 8)
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) + self.places(torch.arange(tokens.shape[1]))
        return self.head(torch.tanh(self.layer(x)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(192, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.flatten(1)[:, None])[0][:, -1])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 3)),
    "layer norm": lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(192), nn.Linear(192, 3)),
    "batch norm": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 3)).eval(),
    "recurrent": Recurrent,
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("self_check", [True, False])
def test_inputs_of_another_type_than_the_weights(name: str, self_check: bool) -> None:
    network = NETWORKS[name]()
    with pytest.raises(
        ValueError, match=r"^batch 1: the input is torch.float64, and the network has torch.float32"
    ) as e:
        fisher(network, [X, X.double()], self_check=self_check)
    assert str(e.value).endswith("convert the input to torch.float32, or the network by model.to(torch.float64)")
    assert isinstance(e.value.__cause__, (RuntimeError, ValueError))
    with pytest.raises(ValueError, match=r"the input is torch.float32, and the network has torch.float64"):
        fisher(network.double(), [X], self_check=self_check)


def test_whole_numbers_where_images_are_expected() -> None:
    with pytest.raises(ValueError, match=r"the input is torch.uint8, .* convert the input to torch.float32$"):
        fisher(NETWORKS["convolution"](), [X.to(torch.uint8)])


@pytest.mark.parametrize("weight", [torch.ones(4, 4, dtype=torch.float64), torch.ones(4, 4, dtype=torch.bfloat16)])
def test_tokens_are_not_blamed_for_a_type_within_the_network(weight: Tensor) -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.table(tokens).mean(1) @ weight)

    with pytest.raises(RuntimeError, match="same dtype"):
        fisher(Embedded(), [{"tokens": TOKENS}])


def test_a_field_of_another_type_is_named() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(192, 3)

        def forward(self, number: Tensor, images: Tensor) -> Tensor:
            return self.head(images.flatten(1)) + number[:, None]

    with pytest.raises(ValueError, match=r"the input\['images'\] is torch.float64"):
        fisher(Named(), [{"number": torch.arange(4), "images": X.double()}])


@pytest.mark.parametrize("word", [10, -1])
def test_a_word_outside_of_the_table(word: int) -> None:
    wrong = TOKENS.clone()
    wrong[2, 1] = word
    message = (
        rf"^batch 1: the input has the number {word} in example 2, and the table 'table.weight' has 10 rows \(0 to 9"
    )
    with pytest.raises(ValueError, match=message) as e:
        fisher(Words(), [TOKENS, wrong])
    assert isinstance(e.value.__cause__, IndexError)
    with pytest.raises(ValueError, match=r"the input\['input_ids'\] has the number"):
        embed_text(Words(), [wrong], forward=lambda model, inputs: model(inputs["input_ids"]))


def test_a_text_that_is_too_long() -> None:
    with pytest.raises(
        ValueError, match=r"looks up the number 6 in the table 'places.weight', which has 6 rows .*shorten"
    ):
        fisher(Words(), [torch.zeros(2, 7, dtype=torch.int64)])


def test_a_network_that_takes_no_input_ids() -> None:
    with pytest.raises(
        ValueError, match=r"\(input_ids\) are passed by name, and Words.forward takes other ones \(tokens\)"
    ) as e:
        embed_text(Words(), [TOKENS])
    assert "pass forward=lambda model, inputs: model(inputs['input_ids'])" in str(e.value)
    embed_text(Words(), [TOKENS], forward=lambda model, inputs: model(inputs["input_ids"]))  # as the error says


def test_adapters_say_the_same() -> None:
    with pytest.raises(ValueError, match=r"the input is torch\.float64"):
        fim_diag(NETWORKS["convolution"](), [(X.double(), torch.zeros(4, dtype=torch.int64))])


@pytest.mark.parametrize("error", [RuntimeError("of dtype"), ValueError("own"), IndexError("own"), TypeError("own")])
def test_errors_that_the_inputs_do_not_explain_stay(error: Exception) -> None:
    class Failing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise error

    with pytest.raises(type(error)) as e:
        fisher(Failing(4, 3), [torch.randn(2, 4)])
    assert e.value is error
    with pytest.raises(type(error)) as e:
        fisher(Failing(4, 3), [{"x": torch.randn(2, 4)}])
    assert e.value is error
