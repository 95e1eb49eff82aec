"""A random subspace: what its coordinates move, how far, and that the loss is that of the moved model."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.errors import RecipeError
from orchestrator.model.adapters import attach, count_by_kind, count_parameters
from orchestrator.model.loss import SummedLoss
from orchestrator.model.subspace import SubspaceModule, _Fastfood, _hadamard
from orchestrator.plan.adaptation import Adaptation
from orchestrator.schema import Subspace

BLOCKS = 2
SAID = Subspace(kind="subspace", dimension=20)
DID = Subspace(kind="subspace", dimension=20, structure_aware=False)


def new_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=BLOCKS, **shape)).float()


def attached(method: Subspace, seed: int = 1) -> Any:
    model = new_model()
    attach(model, Adaptation(full=True, subspace=method), seed)
    return model


def changes(model: Any, coordinates: Tensor) -> dict[str, Tensor]:
    """What these coordinates move each weight by."""
    subspace: SubspaceModule = model.subspace
    with torch.no_grad():
        subspace.coordinates.copy_(coordinates)
        before = dict(model.named_parameters())
        return {name: weight - before[name] for name, weight in subspace.weights(model).items()}


def rows() -> tuple[Tensor, Tensor]:
    ids = torch.arange(24).reshape(2, 12) * 7 % 50
    return ids, ids


def test_hadamards_matrix() -> None:
    matrix = torch.tensor([[1.0]])
    for _ in range(3):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    x = torch.randn(8)
    torch.testing.assert_close(_hadamard(x), matrix @ x)
    assert torch.autograd.gradcheck(_hadamard, torch.randn(8, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize(("dimension", "size"), [(5, 4000), (300, 4000), (300, 70)])
def test_a_projection_is_linear_and_keeps_the_length(dimension: int, size: int) -> None:
    project, torch_seeded = _Fastfood(dimension, size, 1.0, seed=3), torch.Generator().manual_seed(1)
    first, second = (torch.randn(dimension, generator=torch_seeded) for _ in range(2))
    torch.testing.assert_close(project(first + 2 * second), project(first) + 2 * project(second), atol=1e-5, rtol=1e-4)
    assert len(project(first)) == size
    lengths = [
        project(z).norm().item() / z.norm().item()
        for z in (torch.randn(dimension, generator=torch_seeded) for _ in range(40))
    ]
    assert sum(lengths) / len(lengths) == pytest.approx(1, abs=0.1)
    # It fills as many dimensions as there are coordinates, or the space.
    matrix = torch.stack([project(z) for z in torch.eye(dimension)])
    assert torch.linalg.matrix_rank(matrix) == min(dimension, size)


def test_at_first_nothing_is_moved_and_only_the_coordinates_learn() -> None:
    base = SummedLoss(new_model())(*rows())
    for method in (SAID, DID):
        model = attached(method)
        assert torch.equal(SummedLoss(model)(*rows()), base)
        assert count_parameters(model)[0] == method.dimension
        assert {kind: count for kind, (count, _) in count_by_kind(model).items() if count} == {"subspace": 20}


def test_the_whole_model_moves_by_the_length_of_the_coordinates() -> None:
    z = torch.randn(20)
    moved = changes(attached(DID), z)
    assert set(moved) == {name for name, _ in new_model().named_parameters()}
    assert torch.cat([each.flatten() for each in moved.values()]).norm() == pytest.approx(z.norm().item(), rel=0.15)


def test_each_block_moves_by_its_own_scale() -> None:
    model = attached(SAID)
    z = torch.randn(20 - BLOCKS - 1)
    before = changes(model, z)
    with torch.no_grad():
        model.subspace.scales[model.subspace._group_of["model.layers.1.self_attn.q_proj.weight"]] = 3.0
    for name, change in changes(model, z).items():
        torch.testing.assert_close(change, before[name] * (3 if ".layers.1." in name else 1), atol=1e-6, rtol=1e-4)
    block = torch.cat([each.flatten() for name, each in before.items() if ".layers.0." in name])
    assert block.norm() == pytest.approx(z.norm().item(), rel=0.2)


@pytest.mark.parametrize("method", [SAID, DID])
def test_the_loss_is_that_of_the_moved_model(method: Subspace) -> None:
    model = attached(method)
    moved = changes(model, torch.randn(len(model.subspace.coordinates)))
    other = new_model()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter += moved[name]
    loss = SummedLoss(model)(*rows())
    torch.testing.assert_close(loss, SummedLoss(other)(*rows()))
    loss.backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning == {name for name, _ in model.named_parameters() if name.startswith("subspace.")}


def test_the_gradient_is_that_of_the_loss() -> None:
    model = attached(DID).double()
    changes(model, torch.randn(20))
    loss = SummedLoss(model)
    loss(*rows()).backward()
    gradient, step = model.subspace.coordinates.grad, 1e-3
    with torch.no_grad():
        for place in (0, 7):
            beside = []
            for sign in (1, -1):
                model.subspace.coordinates[place] += sign * step
                beside.append(loss(*rows()).item())
                model.subspace.coordinates[place] -= sign * step
            assert gradient[place].item() == pytest.approx((beside[0] - beside[1]) / (2 * step), rel=0.02)


def test_the_subspace_follows_from_the_seed() -> None:
    z = torch.randn(20)
    name = "lm_head.weight"
    first, again, other = (changes(attached(DID, seed), z)[name] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first - other).norm() > first.norm()


def test_scales_alone_are_no_subspace() -> None:
    with pytest.raises(RecipeError, match="dimension: 3 must be above 3"):
        attached(Subspace(kind="subspace", dimension=3))
