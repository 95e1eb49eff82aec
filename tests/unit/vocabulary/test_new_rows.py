"""Rows for new tokens."""

from dataclasses import replace

import torch

from orchestrator.vocabulary.compression import compression, sample_of
from orchestrator.vocabulary.rows import Growth, new_rows

OLD = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
GROWTH = Growth(
    base_tokens=50, parts=[[3], [4, 5, 6], []], how="mean_of_pieces", seed=1, standard_deviation=0.5, pad_to_multiple=64
)


def test_a_row_is_the_mean_over_its_pieces_in_fp32() -> None:
    rows = new_rows(OLD, [[3], [4, 5, 6]], "mean_of_pieces", 1, 0.5)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows[0], OLD[3])
    assert torch.equal(rows[1], OLD[[4, 5, 6]].float().mean(0).to(torch.bfloat16))


def test_mean_gives_every_token_the_mean_of_all_rows() -> None:
    rows = new_rows(OLD, [[3], []], "mean", 1, 0.5)
    assert torch.equal(rows, OLD.float().mean(0).to(torch.bfloat16).expand(2, -1))


def test_normal_has_the_models_deviation_and_its_seed() -> None:
    rows = new_rows(OLD, [[]] * 5_000, "normal", 1, 0.5).float()
    assert abs(rows.std().item() - 0.5) < 0.01
    assert torch.equal(rows, new_rows(OLD, [[]] * 5_000, "normal", 1, 0.5).float())
    assert not torch.equal(rows, new_rows(OLD, [[]] * 5_000, "normal", 2, 0.5).float())


def test_growth_keeps_old_rows_and_pads_with_the_mean() -> None:
    grown = GROWTH("embed", OLD)
    assert grown.shape == (64, 8)
    assert torch.equal(grown[:50], OLD)
    assert torch.equal(grown[53:], OLD.float().mean(0).to(torch.bfloat16).expand(11, -1))


def test_rows_that_the_base_has_spare_are_reused_and_never_cut() -> None:
    padded = torch.cat([OLD, torch.full((20, 8), 7.0, dtype=torch.bfloat16)])
    grown = replace(GROWTH, pad_to_multiple=1)("embed", padded)
    assert len(grown) == 70
    assert torch.equal(grown[50:53], GROWTH("embed", OLD)[50:53])
    assert torch.equal(grown[53:], padded[53:])


def test_embedding_and_head_draw_different_numbers() -> None:
    growth = replace(GROWTH, how="normal")
    assert torch.equal(growth("embed", OLD), growth("embed", OLD))
    assert not torch.equal(growth("embed", OLD)[50:53], growth("head", OLD)[50:53])


def test_sample_ends_at_the_limit() -> None:
    assert sample_of(iter(["abc", "defg", "h"]), max_characters=5) == ["abc", "de"]
    assert sample_of(iter(["abc"]), max_characters=5) == ["abc"]


def test_compression_counts_tokens_per_character() -> None:
    measured = compression(["ab cd", "ef"], before=lambda text: [0] * len(text), after=lambda text: [0] * len(text.split()))
    assert (measured.characters, measured.tokens_before, measured.tokens_after) == (7, 7, 3)
    assert (measured.before, measured.after) == (1, 3 / 7)
