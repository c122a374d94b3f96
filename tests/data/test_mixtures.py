"""Mixtures of sources: shares in every stretch, pure positions, changes of length."""

import numpy as np
import pytest
import torch

from limbeck.core.errors import LimbeckError
from limbeck.data.mixture import PERIOD, MixtureDataset, _shares
from limbeck.data.packing import IGNORE_INDEX, PackedDataset
from limbeck.data.token_store import Split


def split(source: int, n_tokens: int = 2000, document: int = 50) -> Split:
    """Every token is its own place, and tells its source."""
    offsets = np.arange(0, n_tokens + 1, document)
    return Split("train", np.arange(n_tokens, dtype=np.uint32) + source * 100_000, offsets)


def mixture(weights, length: int = 8, seed: int = 0, **changes) -> MixtureDataset:
    parts = [PackedDataset(split(i, **changes), length, seed) for i in range(len(weights))]
    return MixtureDataset(parts, weights, seed)


def sources(batch) -> np.ndarray:
    return (batch.input_ids[:, 0] // 100_000).numpy()


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1], [5, 3, 2], [0.901, 0.049, 0.05], [1, 1, 1, 1e-9]])
@pytest.mark.parametrize("seed", [0, 7])
def test_every_stretch_has_its_share(weights, seed):
    came = sources(mixture(weights, seed=seed).batch(0, 2 * PERIOD + 100))
    for i, weight in enumerate(weights):
        upto = np.concatenate([[0], np.cumsum(came == i)])
        for stretch in (10, 100, 1000):
            in_stretch = upto[stretch:] - upto[:-stretch]
            assert np.abs(in_stretch - stretch * weight / sum(weights)).max() < 2 + stretch / PERIOD


def test_shares_are_whole_numbers_that_add_up():
    assert _shares([0.7, 0.3]) == [7000, 3000]
    assert sum(_shares([1, 1, 1])) == sum(_shares([1e9, 1, 1, 1])) == PERIOD
    assert min(_shares([1e9, 1, 1, 1])) == 1


def test_a_batch_is_a_pure_function_of_the_position_across_epochs_and_rounds():
    one, two = mixture([0.7, 0.3], seed=3), mixture([0.7, 0.3], seed=3)
    total = PERIOD + 50
    whole = one.batch(0, total)
    position = 0
    for stop in (11, 12, 500, PERIOD - 3, total):  # stopped and resumed, batches of all sizes
        got = two.batch(position, stop - position)
        for name in ("input_ids", "position_ids", "targets"):
            assert torch.equal(getattr(got, name), getattr(whole, name)[position:stop])
        position = stop
    assert not torch.equal(mixture([0.7, 0.3], seed=4).batch(0, 50).input_ids, whole.input_ids[:50])


def test_each_source_goes_through_its_own_epochs():
    parts = [PackedDataset(split(0, 200, 20), 8, 5), PackedDataset(split(1, 2000), 8, 5)]
    mixed = MixtureDataset(parts, [0.5, 0.5], 5)
    batch = mixed.batch(0, 200)
    for i, part in enumerate(parts):
        mine = batch.input_ids[torch.from_numpy(sources(batch) == i)]
        assert torch.equal(mine, part.batch(0, len(mine)).input_ids)


def test_no_sequence_comes_again_within_n_sequences():
    mixed = MixtureDataset([PackedDataset(split(0, 200), 8), PackedDataset(split(1), 8)], [0.7, 0.3], shuffle=False)
    n = mixed.n_sequences
    seen = mixed.batch(0, n).input_ids[:, 0].tolist()
    assert len(set(seen)) == n
    assert mixed.count_per_dataset(n + 1)[0] == mixed.datasets[0].n_sequences + 1


@pytest.mark.parametrize("kind", ["packed", "mixture"])
@pytest.mark.parametrize(("before", "now"), [(8, 32), (32, 8), (8, 8), (16, 24)])
@pytest.mark.parametrize("position", [0, 1, 13, 40])
def test_a_change_of_length_reads_nothing_twice_and_leaves_little_out(kind, before, now, position):
    def made(length):
        return PackedDataset(split(0), length, 2) if kind == "packed" else mixture([0.6, 0.4], length, 2)

    first, second = made(before), made(now)
    at = second.position_after(first, position)
    seen = set(first.batch(0, position).input_ids.flatten().tolist()) if position else set()
    later = second.batch(at, 20).input_ids.flatten().tolist()
    assert not seen & set(later)
    assert position * before <= at * now <= position * before + (1 if kind == "packed" else 6) * max(before, now)
    if before == now:
        assert at == position


def test_shuffled_sequences_are_the_packed_ones_in_another_order():
    # two documents of 1,000 tokens: packed, the first 60 sequences would be of one of them
    packed, shuffled = (PackedDataset(split(0, document=1000), 16, 2, shuffle_rows=rows) for rows in (False, True))
    n = packed.n_sequences
    assert len({int(token) // 1000 for token in packed.batch(0, 60).input_ids.flatten()}) == 1
    of_first = sum(int(row[0]) < 1000 for row in shuffled.batch(0, 60).input_ids)
    assert 20 < of_first < 40
    rows = {epoch: shuffled.batch(epoch * n, n) for epoch in (0, 1)}
    for epoch, batch in rows.items():
        expected = {tuple(row.tolist()) for row in packed.batch(epoch * n, n).input_ids}
        assert {tuple(row.tolist()) for row in batch.input_ids} == expected
    assert not torch.equal(rows[0].input_ids, rows[1].input_ids)
    # a position says it all: across the end of an epoch as alone
    torch.testing.assert_close(shuffled.batch(n - 2, 4).targets[2:], rows[1].targets[:2], rtol=0, atol=0)
    assert shuffled.position_after(PackedDataset(split(0, document=1000), 16, 2, shuffle_rows=True), 7) == 7


def test_after_an_epoch_the_next_one_begins():
    first, second = PackedDataset(split(0), 8), PackedDataset(split(0), 999)
    assert second.position_after(first, first.n_sequences) == second.n_sequences
    assert second.position_after(first, first.n_sequences - 1) == second.n_sequences
    assert second.position_after(first, first.n_sequences + 1) == second.n_sequences + 1


def test_the_mask_of_a_split_decides_on_the_targets():
    plain = split(0)
    mask = (plain.tokens % 3 == 0).astype(np.uint8)
    masked = PackedDataset(Split("train", plain.tokens, plain.offsets, mask), 16, 1).batch(0, 30)
    whole = PackedDataset(plain, 16, 1).batch(0, 30)
    kept = masked.targets != IGNORE_INDEX
    assert torch.equal(masked.input_ids, whole.input_ids)
    assert torch.equal(kept, (whole.targets != IGNORE_INDEX) & (whole.targets % 3 == 0))
    assert torch.equal(masked.targets[kept], whole.targets[kept])


def test_weights_must_be_positive():
    with pytest.raises(LimbeckError, match="a positive one for each"):
        mixture([1, 0])
