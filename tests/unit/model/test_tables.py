"""A table in two parts computes what the whole does, and only its new rows learn."""

import pytest
import torch
from torch import Tensor, nn

from orchestrator.model.loss import summed_cross_entropy
from orchestrator.model.tables import split_table

ROWS, OLD, HIDDEN = 50, 37, 8
DTYPES = [torch.float32, torch.bfloat16]


class Tables(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(ROWS, HIDDEN, dtype=dtype)
        self.head = nn.Linear(HIDDEN, ROWS, bias=False, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


def split(tables: Tables) -> Tables:
    for name in ("embed", "head"):
        split_table(tables, name, OLD)
    return tables


@pytest.fixture
def ids() -> Tensor:
    chosen = torch.randint(0, ROWS, (3, 20), generator=torch.Generator().manual_seed(2))
    chosen[0, :4] = torch.tensor([0, OLD - 1, OLD, ROWS - 1])
    return chosen


def loss(tables: Tables, ids: Tensor) -> Tensor:
    hidden = torch.tanh(tables.embed(ids[:, :-1])).flatten(0, 1)
    return summed_cross_entropy(tables.head, hidden, ids[:, 1:].flatten())


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_computes_what_the_whole_does(ids: Tensor, dtype: torch.dtype) -> None:
    whole, parts = Tables(dtype), split(Tables(dtype))
    assert torch.equal(parts.embed(ids), whole.embed(ids))
    torch.testing.assert_close(parts(ids), whole(ids))
    assert parts.head.out_features == ROWS


@pytest.mark.parametrize("dtype", DTYPES)
def test_new_rows_get_the_gradient_that_they_get_in_the_whole(ids: Tensor, dtype: torch.dtype) -> None:
    whole, parts = Tables(dtype), split(Tables(dtype))
    for tables in (whole, parts):
        loss(tables, ids).backward()
    for name in ("embed", "head"):
        gradient = getattr(whole, name).weight.grad[OLD:]
        assert gradient.any()
        # In bf16 the two add up in another order.
        torch.testing.assert_close(
            getattr(parts, name).new_rows.grad, gradient, rtol=0.02, atol=1e-5 if dtype == torch.float32 else 5e-3
        )
        assert getattr(parts, name).old_rows.grad is None


def test_what_learns_is_the_new_rows_alone(ids: Tensor) -> None:
    tables = split(Tables(torch.float32))
    old = [tables.get_parameter(f"{name}.old_rows").clone() for name in ("embed", "head")]
    learning = [parameter for parameter in tables.parameters() if parameter.requires_grad]
    assert [len(parameter) for parameter in learning] == [ROWS - OLD] * 2
    before = loss(tables, ids).item()
    optimizer = torch.optim.AdamW(learning, lr=0.1)
    for _ in range(5):
        loss(tables, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss(tables, ids).item() < before
    for name, before_it in zip(("embed", "head"), old, strict=True):
        assert torch.equal(tables.get_parameter(f"{name}.old_rows"), before_it)


@pytest.mark.parametrize("first", [0, ROWS, ROWS + 1])
def test_there_must_be_rows_of_both_kinds(first: int) -> None:
    with pytest.raises(AssertionError, match=f"no row to split {ROWS} at: {first}"):
        split_table(Tables(torch.float32), "embed", first)
