"""When recovery runs in bfloat16, as on a CPU with matrix units."""

from __future__ import annotations

import pytest
import torch
from dun_zoo import Block, Denoiser, ListOfBlocks
from test_recover import distance, measurements, same, teacher, values
from torch import Tensor, nn

import lorun_adapt
from lorun_adapt import speed


@pytest.fixture
def matrix_units(monkeypatch) -> None:
    monkeypatch.setattr(speed, "_multiplies_in_bfloat16", lambda: True)


class Watched(Denoiser):
    """Notes in which dtype its convolutions give what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(self.head(x).dtype)
        return super().forward(x)


class Fourier(Denoiser):
    """Has an operation that knows no bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.ifft2(torch.fft.fft2(super().forward(x))).real


def network(denoiser: type[Denoiser]) -> nn.Module:
    torch.manual_seed(0)
    return ListOfBlocks([Block(denoiser()) for _ in range(3)]).eval()


def test_networks_that_run_in_it_recover_in_it(matrix_units) -> None:
    net = network(Watched)
    lorun = lorun_adapt.convert(net, rank=1)
    before = distance(lorun, net)
    lorun.recover(net, measurements(), steps=25)
    assert net.blocks[0].denoiser.seen == {torch.float32, torch.bfloat16}
    assert distance(lorun, net) < 0.5 * before
    assert all(tensor.dtype == torch.float32 for tensor in lorun.state_dict().values())


def test_it_is_the_same_to_the_bit_with_every_run_and_after_a_stop(matrix_units, tmp_path) -> None:
    net, checkpoint = teacher(), tmp_path / "state.safetensors"
    runs = [lorun_adapt.convert(net, rank=1) for _ in range(3)]
    for lorun in runs[:2]:
        lorun.recover(net, measurements(), steps=30)
    assert same(values(runs[0]), values(runs[1]))

    def stopped():
        for index, batch in enumerate(measurements(60)):
            if index == 40:
                raise KeyboardInterrupt
            yield batch

    class Stopped:
        def __iter__(self):
            return stopped()

    with pytest.warns(UserWarning, match="stopped"):
        runs[2].recover(net, Stopped(), steps=30, checkpoint=checkpoint)
    runs[2].recover(net, measurements(60), steps=30, checkpoint=checkpoint)
    whole = lorun_adapt.convert(net, rank=1)
    whole.recover(net, measurements(60), steps=30)
    assert same(values(runs[2]), values(whole))


def test_networks_that_do_not_run_in_it_recover_without(matrix_units) -> None:
    net = network(Fourier)
    lorun = lorun_adapt.convert(net, rank=1)
    before = distance(lorun, net)
    lorun.recover(net, measurements(), steps=25)
    assert distance(lorun, net) < 0.5 * before


def test_it_is_not_used_where_rounding_would_hide_what_is_left(matrix_units) -> None:
    net = network(Watched)
    lorun = lorun_adapt.convert(net, rank=8)
    lorun.recover(net, measurements(), steps=150)  # which brings it very near
    before = distance(lorun, net)
    net.blocks[0].denoiser.seen.clear()
    lorun.recover(net, measurements(), steps=5)
    assert distance(lorun, net) <= 1.1 * before


class Flattening(Denoiser):
    """Takes for granted in which order activations lie."""

    def forward(self, x: Tensor) -> Tensor:
        head = torch.relu(self.head(x))
        return x + 0.1 * self.tail(torch.relu(self.body(head.view(len(x), -1).view(head.shape))))


class Ordered(Denoiser):
    """Notes whether activations were channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(self.body(self.head(x)).is_contiguous(memory_format=torch.channels_last))
        return super().forward(x)


def test_convolutions_are_channels_last_while_they_train() -> None:
    for denoiser in (Ordered, Flattening):
        net = network(denoiser)
        lorun = lorun_adapt.convert(net, rank=1)
        before = distance(lorun, net)
        held = [*net.parameters(), *lorun.parameters()]
        places = [p.data_ptr() for p in held]
        weights = [p.clone() for p in net.parameters()]
        lorun.recover(net, measurements(), steps=25)
        assert distance(lorun, net) < 0.5 * before
        assert [p.data_ptr() for p in held] == places and all(p.is_contiguous() for p in held)
        assert all(torch.equal(p, old) for p, old in zip(net.parameters(), weights))
        if denoiser is Ordered:
            assert True in net.blocks[0].denoiser.seen and True in lorun.network.blocks[0].denoiser.seen
