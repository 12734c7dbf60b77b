"""Finding stages: what is taken, what is left, and stages named by hand."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from dun_zoo import ZOO, Block, Denoiser, EncoderDecoder, HeadBodyTail, ListOfBlocks, ListOfDenoisers, Looped
from torch import Tensor, nn

import lorun_adapt
from lorun_adapt import LoRunError, find_stages
from lorun_adapt.files.layout import is_adapter_name
from lorun_adapt.stages.numbering import group_name
from lorun_adapt.util.toy import ToyStage, ToyUnfoldingNet


def names(found) -> list[list[str]]:
    return [[str(site) for site in group.sites] for group in found.groups]


class Residual(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x)


def deep_denoiser(width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), *(Residual(width) for _ in range(4)), nn.Conv2d(width, 1, 1)
    )


def test_the_outermost_repetition_wins() -> None:
    net = ListOfDenoisers([deep_denoiser() for _ in range(3)])
    assert names(find_stages(net)) == [["denoisers.0", "denoisers.1", "denoisers.2"]]


def test_blocks_within_an_unequal_stage_are_not_stages() -> None:
    net = ListOfDenoisers([deep_denoiser(24), *(deep_denoiser() for _ in range(3))])
    found = find_stages(net)
    assert names(found) == [["denoisers.1", "denoisers.2", "denoisers.3"]]
    (listed,) = found.not_taken
    assert listed.modules == ("denoisers.0",) and "another shape" in listed.reason
    assert listed.num_parameters == sum(p.numel() for p in net.denoisers[0].parameters())


def test_blocks_of_a_looped_denoiser_are_not_stages() -> None:
    net = Looped()
    net.p = deep_denoiser()
    assert names(find_stages(net, calls={"p": 4})) == [[f"p (call {k})" for k in range(4)]]
    assert names(find_stages(net, example_inputs=ZOO["looped"]().inputs)) == [[f"p (call {k})" for k in range(4)]]


def test_layers_of_an_unseen_loop_are_an_error() -> None:
    net = Looped()
    net.p = deep_denoiser()
    with pytest.raises(LoRunError, match="p.1, p.2.*example_inputs"):
        find_stages(net)


def test_equal_numbers_of_other_stages_are_not_paired() -> None:
    net = EncoderDecoder()
    net.stage4_decoder = nn.Conv2d(8, 1, 1)
    stages = {group.name: [site.stage for site in group.sites] for group in find_stages(net).groups}
    assert stages == {"stage_encoder": [1, 2, 3], "stage_decoder": [0, 1, 2]}


class Unet(nn.Module):
    """Blocks of one width at three scales: a denoiser, which unfolds nothing by itself."""

    def __init__(self, in_lists: bool) -> None:
        super().__init__()
        self.head, self.tail = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        blocks = [Residual() for _ in range(6)]
        self.down, self.up = nn.ModuleList(blocks[:3]), nn.ModuleList(blocks[3:])
        if not in_lists:
            del self.down, self.up
            self.down1, self.down2, self.middle1, self.middle2, self.up1, self.up2 = blocks
        self.blocks = (lambda: [*self.down, *self.up]) if in_lists else self._named

    def _named(self) -> list[nn.Module]:
        return [self.down1, self.down2, self.middle1, self.middle2, self.up1, self.up2]

    def forward(self, x, *_):
        x, skips, blocks = self.head(x), [], self.blocks()
        for block in blocks[:2]:
            skips.append(block(x))
            x = F.avg_pool2d(skips[-1], 2)
        for block in blocks[2:4]:
            x = block(x)
        for block in blocks[4:]:
            x = block(F.interpolate(x, scale_factor=2) + skips.pop())
        return self.tail(x)


class Chain(nn.Module):
    """Residual blocks, one after another, in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Conv2d(1, 8, 3, padding=1), nn.ModuleList([Residual() for _ in range(4)])

    def forward(self, x, *_):
        x = self.head(x)
        for block in self.body:
            x = block(x)
        return x.mean(1, keepdim=True)


@pytest.mark.parametrize("net", [Unet(True), Unet(False), Chain()])
def test_a_network_that_unfolds_nothing_is_refused(net: nn.Module) -> None:
    with pytest.raises(LoRunError, match=f"{type(net).__name__} does not seem to unfold an algorithm.*stages="):
        find_stages(net, example_inputs=ZOO["looped"]().inputs)
    by_hand = {"down": "down.*", "down1": ["down1", "up1"], "body": "body.*"}
    stages = next(stages for name, stages in by_hand.items() if hasattr(net, name))
    assert len(find_stages(net, stages=stages)) > 1


@pytest.mark.parametrize("inner", [Unet(True), Unet(False), Chain()])
def test_what_repeats_in_a_looped_denoiser_is_no_stage(inner: nn.Module) -> None:
    net = Looped()
    net.p = inner
    with pytest.raises(LoRunError, match=r"inside p, such as p\..*: if p is called in a loop, pass example_inputs="):
        find_stages(net)
    found = find_stages(net, example_inputs=ZOO["looped"]().inputs)
    assert names(found) == [[f"p (call {k})" for k in range(4)]] and not found.not_taken


class Steps(nn.Module):
    """Denoisers, and between them a data step of some kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.ds = kind, nn.ModuleList([Denoiser() for _ in range(3)])

    def forward(self, y, mask):
        x = y.clone()
        for denoiser in self.ds:
            if self.kind == "in place, before":
                x -= 0.1 * (x - y)
            x = denoiser(x)
            if self.kind == "in place, after":
                x[mask.expand_as(x) > 0] = y[mask.expand_as(x) > 0]
        return x


class Remembered(Denoiser):
    """A stage that takes the estimate alone; the measurements are where it has been told to look."""

    def forward(self, x):
        return super().forward(x - 0.1 * (x - self.told[0]))


class Remembers(ListOfBlocks):
    def __init__(self) -> None:
        super().__init__([Remembered() for _ in range(3)])
        self.told = []
        for block in self.blocks:
            block.told = self.told

    def forward(self, y, mask):
        self.told[:] = [y]
        x = y
        for block in self.blocks:
            x = block(x)
        return x


class InThreads(Steps):
    """Each denoiser runs in another thread, where nothing shows which tensors are read."""

    def forward(self, y, mask):
        x = y
        with ThreadPoolExecutor(1) as pool:
            for denoiser in self.ds:
                x = pool.submit(denoiser, x - 0.1 * (x - y)).result()
        return x


class Takes(Denoiser):
    def forward(self, x, *others):
        y = others[0].y if isinstance(others[0], SimpleNamespace) else others[0] / 255
        return super().forward(x - 0.1 * (x - y))


class Passes(ListOfBlocks):
    """Stages that take the measurements as something else than a tensor of floats."""

    def __init__(self, others) -> None:
        super().__init__([Takes() for _ in range(3)])
        self.others = others

    def forward(self, y, mask):
        x = y
        for block in self.blocks:
            x = block(x, *self.others(y, mask))
        return x


@pytest.mark.parametrize(
    "net",
    [
        Steps("in place, before"),
        Steps("in place, after"),
        Passes(lambda y, mask: (SimpleNamespace(y=y),)),
        Passes(lambda y, mask: ((255 * y).byte(), mask.bool())),
        Remembers(),
        InThreads("in threads"),
    ],
)
def test_data_steps_of_all_kinds_are_seen(net: nn.Module) -> None:
    assert len(find_stages(net, example_inputs=ZOO["looped"]().inputs)) == 3


def test_what_is_declared_is_a_stage() -> None:
    class Remembers(Looped):
        def forward(self, y, mask):
            x = y
            for _ in range(3):
                x = self.p(x)
            return x

    with pytest.raises(LoRunError, match="does not seem to unfold"):
        find_stages(Remembers(), example_inputs=ZOO["looped"]().inputs)
    assert len(find_stages(Remembers(), example_inputs=ZOO["looped"]().inputs, calls={"p": 3})) == 3


@pytest.mark.parametrize("name", ["blocks", "blocks2d"])
def test_turns_are_those_of_the_list(name: str) -> None:
    net = nn.Module()
    kinds = (Big, Big, Residual, Big, Big, Residual)
    setattr(net, name, nn.ModuleList([kind() for kind in kinds]))
    stages = [[site.stage for site in group.sites] for group in find_stages(net).groups]
    assert stages == [[0, 1, 2, 3], [1, 3]]


def test_a_wrapped_network_is_no_child() -> None:
    net = ZOO["list_of_blocks"]().net
    assert names(find_stages(nn.DataParallel(net))) == [[f"module.blocks.{k}" for k in range(4)]]
    assert names(find_stages(torch.compile(net))) == [[f"_orig_mod.blocks.{k}" for k in range(4)]]


def test_a_loop_may_hide_behind_names() -> None:
    with pytest.warns(
        UserWarning, match="the stages head, body, tail: if one of them is called in a loop, pass example"
    ):
        find_stages(HeadBodyTail(loops=3))


class Big(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small, self.conv = Residual(), nn.Conv2d(8, 8, 3, padding=1)


@pytest.mark.parametrize("kinds", [(Big, Residual), (Residual, Big)])
def test_kinds_that_alternate_in_one_list(kinds) -> None:
    net = nn.Module()
    net.blocks = nn.ModuleList([kind() for _ in range(4) for kind in kinds])
    net.mu = nn.ModuleList([nn.Sequential(nn.Linear(20, 20)) for _ in range(4)])
    found = find_stages(net)
    assert sorted(names(found)) == sorted(
        [
            [f"blocks.{k}" for k in range(0, 8, 2)],
            [f"blocks.{k}" for k in range(1, 8, 2)],
            [f"mu.{k}" for k in range(4)],
        ]
    )
    assert [[site.stage for site in group.sites] for group in found.groups] == [[0, 1, 2, 3]] * 3
    assert len(found) == 4 and not found.not_taken


class TwoInputs(Residual):
    def forward(self, x, y):
        return super().forward(x) + y


def test_sequentials_that_serve_as_lists() -> None:
    class TwoLists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k_stages = nn.Sequential(*[TwoInputs(4) for _ in range(3)])
            self.x_stages = nn.Sequential(*[TwoInputs(8) for _ in range(3)])

        def forward(self, y):
            k, x = y[:, :4], y
            for k_stage, x_stage in zip(self.k_stages, self.x_stages):
                k, x = k_stage(k, y[:, :4]), x_stage(x, y)
            return x

    expected = [[f"k_stages.{k}" for k in range(3)], [f"x_stages.{k}" for k in range(3)]]
    assert names(find_stages(TwoLists())) == expected
    assert names(find_stages(TwoLists(), example_inputs=(torch.rand(1, 8, 4, 4),))) == expected


def test_all_that_is_large_is_taken_or_listed_once() -> None:
    net = EncoderDecoder()
    net.extra = nn.Module()
    net.extra.head, net.extra.tiny = nn.Conv2d(8, 8, 3), nn.Linear(2, 2)
    net.extra.blocks = nn.ModuleList([Residual() for _ in range(2)])
    net.phi = nn.Parameter(torch.zeros(1000))
    net.step = nn.Parameter(torch.zeros(1))
    found = find_stages(net)
    assert {item.modules: item.reason for item in found.not_taken} == {
        ("stage1_encoder",): "like a stage, but of another shape",
        ("extra",): "outside the stages",
        ("phi",): "outside the stages",
    }
    listed = sum(item.num_parameters for item in found.not_taken)
    taken = sum(group.num_parameters * len(group.sites) for group in found.groups)
    assert listed + taken == sum(p.numel() for p in net.parameters()) - 1


def test_a_small_repeated_group_is_listed() -> None:
    net = ListOfDenoisers([Denoiser(32) for _ in range(3)])
    net.gates = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))
    found = find_stages(net)
    assert len(found.groups) == 1
    assert [item.modules for item in found.not_taken] == [("gates.0", "gates.1", "gates.2")]
    assert "below 5%" in str(found) and "gates.0, gates.1, gates.2" in str(found)


def test_groups_of_unequal_length_meet_by_number() -> None:
    found = find_stages(EncoderDecoder())
    stages = {group.name: [site.stage for site in group.sites] for group in found.groups}
    assert stages == {"stage_decoder": [0, 1, 2, 3], "stage_encoder": [1, 2, 3]}
    assert len(found) == 4


def test_order_is_that_of_execution_when_it_is_known() -> None:
    class TailFirst(HeadBodyTail):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.tail, self.body, self.head = Denoiser(), nn.ModuleList([Denoiser()]), Denoiser()
            self.loops = 0

    inputs = ZOO["head_body_tail"]().inputs
    assert names(find_stages(TailFirst(), example_inputs=inputs)) == [["head", "body.0", "tail"]]


def test_without_a_run_the_order_is_that_of_numbers() -> None:
    net = nn.Module()
    for number in (11, 2, 10, 1):
        setattr(net, f"it{number}", Block(Denoiser()))
    assert names(find_stages(net)) == [["it1", "it2", "it10", "it11"]]
    net = nn.Module()
    for name in ("b2", "a1"):
        setattr(net, name, Block(Denoiser()))
    assert names(find_stages(net)) == [["b2", "a1"]]


def test_layers_and_parameters_that_may_be_stages() -> None:
    class Lista(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W, self.S = (nn.ModuleList(nn.Linear(4, 4) for _ in range(3)) for _ in "ab")

        def forward(self, y):
            x = y
            for w, s in zip(self.W, self.S):
                x = F.softshrink(w(y) + s(x), 0.1)
            return x

    for inputs in (None, (torch.rand(2, 4),)):
        with pytest.raises(
            LoRunError, match=r"W, S hold single layers; if these are the stages, pass stages=\['W.\*', "
        ):
            find_stages(Lista(), example_inputs=inputs)
    assert names(find_stages(Lista(), stages=["W.*", "S.*"])) == [[f"{p}.{k}" for k in range(3)] for p in "WS"]
    net = nn.Module()
    net.kernels = nn.ParameterList(torch.rand(4, 4) for _ in range(3))
    with pytest.raises(LoRunError, match="kernels is a list of parameters, and stages must be modules"):
        find_stages(net)


def test_looking_changes_nothing() -> None:
    case = ZOO["looped"]()
    case.net.train()
    state = torch.get_rng_state()
    find_stages(case.net, example_inputs=case.inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert case.net.training and not any(module._forward_pre_hooks for module in case.net.modules())


def test_modules_under_two_names_are_one_stage() -> None:
    net = ListOfDenoisers([Denoiser() for _ in range(3)])
    net.aliases = nn.ModuleDict({f"d{k}": denoiser for k, denoiser in enumerate(net.denoisers)})
    assert names(find_stages(net)) == [["denoisers.0", "denoisers.1", "denoisers.2"]]


def test_numbers_in_the_map() -> None:
    net = ZOO["list_of_blocks"]().net
    found = find_stages(net)
    assert len(found) == 4
    assert found.groups[0].num_parameters == sum(p.numel() for p in net.blocks[0].parameters())
    lines = str(found).splitlines()
    assert "ListOfBlocks: 4 stages" in lines[0]
    assert "blocks.3" in str(found) and "\x1b" not in str(found)


@pytest.mark.parametrize(
    "stages, expected",
    [
        ("blocks.*", [["blocks.0", "blocks.1", "blocks.2", "blocks.3"]]),
        ("blocks.?.denoiser", [[f"blocks.{k}.denoiser" for k in range(4)]]),
        (["blocks.[01]"], [["blocks.0", "blocks.1"]]),
        (["blocks.1", "blocks.3"], [["blocks.1", "blocks.3"]]),
        (
            ["blocks.*.denoiser.head", "blocks.*.denoiser.body"],
            [[f"blocks.{k}.denoiser.{part}" for k in range(4)] for part in ("head", "body")],
        ),
        ([["blocks.0", "blocks.1"], ["blocks.2", "blocks.3"]], [["blocks.0", "blocks.1"], ["blocks.2", "blocks.3"]]),
    ],
)
def test_named_by_hand(stages, expected) -> None:
    assert names(find_stages(ZOO["list_of_blocks"]().net, stages=stages)) == expected


@pytest.mark.parametrize(
    "stages, message",
    [
        ("fcs.*", "no module of ListOfBlocks matches 'fcs.\\*': its modules are blocks"),
        (["blocks.0", "nothing"], "no module 'nothing'"),
        (["blocks.0"], "expected two or more stages"),
        (["blocks.0", "blocks.1.denoiser"], "expected stages of equal shape in stages=, found tensor 'step'"),
        (["blocks.0", "blocks.0.denoiser"], "inside another"),
    ],
)
def test_wrong_names_are_errors(stages, message) -> None:
    with pytest.raises(LoRunError, match=message):
        find_stages(ZOO["list_of_blocks"]().net, stages=stages)


def test_unequal_shapes_by_hand_are_an_error() -> None:
    net = ListOfBlocks([Block(Denoiser(8)), Block(Denoiser(6))])
    with pytest.raises(LoRunError, match=r"'denoiser.head.weight' with \(8, 1, 3, 3\).* and \(6, 1, 3, 3\)"):
        find_stages(net, stages="blocks.*")


@pytest.mark.parametrize("net", [Denoiser(), deep_denoiser(), Looped(), nn.Linear(2, 2)])
def test_nothing_repeated_is_an_error(net: nn.Module) -> None:
    if isinstance(net, nn.Sequential):
        net = nn.Sequential(*[layer for layer in net if not isinstance(layer, Residual)])
    with pytest.raises(LoRunError, match="no repeated stage"):
        find_stages(net)


def test_wrong_calls_and_inputs_are_errors() -> None:
    with pytest.raises(LoRunError, match="no module 'q'"):
        find_stages(Looped(), calls={"q": 3})
    with pytest.raises(LoRunError, match="expected two or more calls"):
        find_stages(Looped(), calls={"p": 1})
    with pytest.raises(LoRunError, match="cannot run on its example inputs"):
        find_stages(Looped(), example_inputs=(torch.zeros(1),))


def test_batches_of_deepinv_data_sets_get_a_hint() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.denoiser = Denoiser()

        def forward(self, x: torch.Tensor, y: torch.Tensor, physics: SimpleNamespace) -> torch.Tensor:
            return self.denoiser(x - physics.A_adjoint(physics.A(x) - y))

    class Unfolded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList(Stage() for _ in range(3))

        def forward(self, y: torch.Tensor, physics: SimpleNamespace) -> torch.Tensor:
            x = y
            for stage in self.stages:
                x = stage(x, y, physics)
            return x

    net, truth = Unfolded(), torch.rand(2, 1, 8, 8)
    physics = SimpleNamespace(A=torch.neg, A_adjoint=torch.neg)
    hint = r"for deepinv's batches, \(x, y\), pass \(x, y, physics\)"
    with pytest.raises(LoRunError, match=f"cannot run on its example inputs .*{hint}"):
        lorun_adapt.convert(net, rank=1, calibration=[(truth, -truth)], steps=1)
    lorun = lorun_adapt.convert(net, rank=1)
    with pytest.raises(LoRunError, match=f"cannot run on the first batch .*{hint}"):
        lorun.recover(net, [(truth, -truth)], steps=1)
    for batch in ((-truth, physics), (truth, -truth, physics)):
        lorun.recover(net, [batch], steps=1)
    assert lorun(-truth, physics).shape == truth.shape


def test_modules_under_two_names_are_found_once() -> None:
    blocks = [Block(Denoiser()) for _ in range(2)]
    again = ListOfBlocks([blocks[0], blocks[0], blocks[1], blocks[1]])
    assert names(find_stages(again)) == [["blocks.0", "blocks.2"]]

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = ListOfBlocks([Block(Denoiser()) for _ in range(3)])
            self.stages = self.net.blocks

        def forward(self, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.net(y, mask)

    found = find_stages(Wrapper(), example_inputs=ZOO["list_of_blocks"]().inputs)
    assert names(found) == [["net.blocks.0", "net.blocks.1", "net.blocks.2"]]


def test_shells_of_which_only_some_run() -> None:
    class Shell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.denoiser = Denoiser()

    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList(Shell() for _ in range(3))

        def forward(self, y: torch.Tensor, count: int = 3) -> torch.Tensor:
            x = y
            for stage in self.stages[:count]:
                x = stage.denoiser(x - 0.5 * (x - y))
            return x

    for count in (1, 2, 3):
        found = find_stages(Early(), example_inputs=(torch.rand(1, 1, 8, 8), count))
        assert names(found) == [[f"stages.{k}.denoiser" for k in range(3)]]


def test_a_looped_module_must_be_called() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = Denoiser()

        def forward(self, y: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                y = self.p.forward(y)
            return y

    with pytest.raises(LoRunError, match="p of Other is not called in a forward, so its calls cannot be told apart"):
        find_stages(Other(), stages="p", calls={"p": 3}, example_inputs=(torch.rand(1, 1, 8, 8),))


def test_sentences_that_say_what_to_do() -> None:
    class Named(ListOfBlocks):
        def forward(self, y, *, mask):
            return super().forward(y, mask)

    with pytest.raises(LoRunError, match="its forward takes mask by keyword only: wrap it in a module"):
        find_stages(Named([Block(Denoiser()) for _ in range(3)]), example_inputs=(torch.rand(1, 1, 8, 8),))
    bare = nn.Module()
    bare.weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(LoRunError, match="no module 'weight', given in stages=: it has none"):
        find_stages(bare, stages=["weight", "weight"])
    net = ListOfBlocks([Block(Denoiser()) for _ in range(3)])
    with pytest.raises(LoRunError, match=r"in each batch of calibration=$"):  # no word of deepinv
        find_stages(net, example_inputs=(torch.rand(1, 1, 8, 8), torch.rand(2, 3), torch.rand(1)))


def test_characters_that_a_pattern_leaves_out() -> None:
    net = ToyUnfoldingNet(stages=4)
    (group,) = lorun_adapt.find_stages(net, stages="stages.[!01]").groups
    assert [site.module for site in group.sites] == ["stages.2", "stages.3"]
    with pytest.raises(LoRunError, match=r"no module of ToyUnfoldingNet matches 'stages\.\[0'"):
        lorun_adapt.find_stages(net, stages="stages.[0")


class LoopBesideList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = ToyStage(), nn.ModuleList(ToyStage(6) for _ in range(3))

    def forward(self, y: Tensor) -> Tensor:
        x = y
        for q in self.q:
            x = q(self.p(x, y), y)
        return x


class HeadAndLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = ToyStage(), ToyStage()

    def forward(self, y: Tensor) -> Tensor:
        x = self.head(y, y)
        for _ in range(3):
            x = self.body(x, y)
        return x


@pytest.mark.parametrize("kind", [ToyUnfoldingNet, LoopBesideList, HeadAndLoop])
def test_a_map_as_arguments_finds_the_same(kind: type[nn.Module]) -> None:
    net = kind()
    found = lorun_adapt.find_stages(net, example_inputs=(torch.rand(1, 1, 8, 8),))
    again = lorun_adapt.find_stages(net, **found.as_arguments())
    assert [group.sites for group in again.groups] == [group.sites for group in found.groups]


def test_looking_leaves_the_inputs_alone() -> None:
    class InPlace(ToyUnfoldingNet):
        def forward(self, y: Tensor) -> Tensor:
            return super().forward(y.mul_(2))

    y = torch.ones(1, 1, 8, 8)
    assert len(lorun_adapt.find_stages(InPlace(), example_inputs=(y,))) == 3
    assert torch.equal(y, torch.ones(1, 1, 8, 8))


@pytest.mark.parametrize("name", ["reconstruction" * 8, "-a", "___"])
def test_groups_have_names_that_folders_can_have(name: str) -> None:
    first = group_name([(f"{name}.0", None), (f"{name}.1", None)], [])
    assert is_adapter_name(first) and is_adapter_name(group_name([(f"{name}.0", None)], [first]))
