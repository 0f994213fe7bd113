"""Cutting an update to a rank: the nearest matrix there is, and the share it keeps."""

import matplotlib.pyplot as plt
import pytest
import torch

from minillm.teach import lora_view


def test_the_cut_is_the_nearest_matrix_of_its_rank():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, generator=rng, dtype=torch.float64)
    values = torch.linalg.svdvals(x)
    for rank in range(6):
        cut = lora_view.truncate(x, rank)
        assert torch.linalg.matrix_rank(cut) == rank
        error = (x - cut).square().sum()
        torch.testing.assert_close(error, values[rank:].square().sum())
        share = 1 - error / x.square().sum()
        assert abs(lora_view.share(values, rank) - share) < 1e-12
        for _ in range(20):  # no other matrix of this rank comes nearer
            a = torch.randn(7, max(rank, 1), generator=rng).double()
            best = torch.linalg.lstsq(a, x).solution if rank else torch.zeros(1, 5).double()
            assert (x - a * (rank > 0) @ best).square().sum() >= error - 1e-12
    with pytest.raises(ValueError, match="rank=6 must be in 0 to 5"):
        lora_view.truncate(x, 6)
    with pytest.raises(ValueError, match="rank=-1"):
        lora_view.share(values, -1)


def test_the_share_does_not_depend_on_the_order():
    assert lora_view.share([1.0, 2.0, 2.0], 2) == lora_view.share([2.0, 1.0, 2.0], 2) == 8 / 9


def test_the_picture_shows_the_rank_that_is_asked_for():
    spectra = {"q": [3.0, 1.0, 0.5, 0.1], "v": [2.0, 2.0, 1.0, 0.5]}
    quality = {0: 0.0, 1: 0.4, 4: 1.0}
    fig = lora_view.picture(spectra, quality, 2)
    left, right = fig.axes
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert labels == [f"{k}: {lora_view.share(s, 2):.0%} kept" for k, s in spectra.items()]
    assert [len(line.get_xdata()) for line in left.get_lines()[:4]] == [4, 2, 4, 2]
    marked = right.get_lines()[1]
    assert (marked.get_xdata()[0], marked.get_ydata()[0]) == (1, 0.4)  # 2 was not measured
    assert right.get_title() == "at rank 1: 40%"
    with pytest.raises(ValueError, match="rank=0 is below 1"):
        lora_view.picture(spectra, {1: 0.4}, 0)
    plt.close("all")
