"""A checksum differs when a tensor does."""

import pytest
import torch
from torch import Tensor

from orchestrator.model.checksum import checksum

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
MORE_THAN_A_CHUNK = (1 << 22) + 5


def values(count: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(1)).to(dtype)


def with_bit_flipped(tensor: Tensor, place: int, bit: int) -> Tensor:
    raw = tensor.clone().view(torch.uint8)
    raw[place * tensor.element_size() + bit // 8] ^= 1 << bit % 8
    return raw.view(tensor.dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_one_bit_counts(dtype):
    tensor = values(9, dtype)
    flipped = [
        checksum(with_bit_flipped(tensor, place, bit)) for place in range(9) for bit in range(8 * tensor.element_size())
    ]
    assert checksum(tensor) not in flipped


@pytest.mark.parametrize("place", [0, MORE_THAN_A_CHUNK // 2, MORE_THAN_A_CHUNK - 1])
def test_any_one_bit_of_a_large_tensor_counts(place):
    tensor = values(MORE_THAN_A_CHUNK, torch.bfloat16)
    before = checksum(tensor)
    assert all(checksum(with_bit_flipped(tensor, place, bit)) != before for bit in (0, 7, 15))


@pytest.mark.parametrize("dtype", FLOATS)
def test_two_values_that_change_places_count(dtype):
    tensor = values(9, dtype)
    swapped = tensor[[0, 7, 2, 3, 4, 5, 6, 1, 8]]
    assert checksum(swapped) != checksum(tensor)


@pytest.mark.parametrize("place", [0, 1, 2, 3, 8])
def test_two_values_that_change_places_far_apart_count(place):
    tensor = torch.zeros(MORE_THAN_A_CHUNK, dtype=torch.bfloat16)
    tensor[place] = 1
    swapped = [checksum(tensor.roll(distance)) for distance in range((1 << 22) - place, MORE_THAN_A_CHUNK - place)]
    assert checksum(tensor) not in swapped
    assert len(set(swapped)) == len(swapped)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, *FLOATS])
def test_equal_tensors_of_any_dtype_and_layout_are_equal(dtype):
    tensor = (values(12, torch.float32) * 4).to(dtype).reshape(3, 4)
    assert checksum(tensor) == checksum(tensor.clone()) == checksum(tensor.t().contiguous().t())
    other = tensor.clone()
    other[1, 2] = 1 - other[1, 2].to(torch.int64)
    assert checksum(other) != checksum(tensor)


@pytest.mark.parametrize("cut", [1, 1 << 22, MORE_THAN_A_CHUNK - 1])
def test_those_of_its_parts_add_up_to_that_of_a_tensor(cut):
    tensor = values(MORE_THAN_A_CHUNK, torch.float32)
    parts = checksum(tensor[:cut]) + checksum(tensor[cut:], cut)
    assert (parts - checksum(tensor)) % (1 << 64) == 0
    assert (parts - checksum(tensor.flip(0))) % (1 << 64) != 0


def test_a_parameter_and_an_empty_tensor_have_one_too():
    parameter = torch.nn.Parameter(values(4, torch.float32))
    assert checksum(parameter) == checksum(parameter.detach())
    assert checksum(torch.zeros(0)) == 0
