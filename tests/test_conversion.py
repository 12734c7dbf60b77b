"""Ranks, configs, factorisation and alignment."""

from __future__ import annotations

import copy
import logging
import threading
import warnings
from collections import OrderedDict, defaultdict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conversions import relative
from dun_zoo import ZOO, Attention, Block, Denoiser, Layers, ListOfBlocks, ListOfDenoisers, dncnn
from peft import LoraConfig
from torch import nn

import lorun_adapt
from lorun_adapt import LoRunError, LoRunModel, convert
from lorun_adapt.factorise.align import hidden_channels
from lorun_adapt.network.adapter import private_tensors, terms_of
from lorun_adapt.terms.factors import rank_for_energy


def adapted(lorun: LoRunModel, stage: int = 0) -> dict[str, int]:
    group = lorun.stage_map.groups[0]
    return {name: term.rank for name, term in terms_of(lorun.adapter_of(group, group.sites[stage])).items()}


def scalings(lorun: LoRunModel) -> dict[str, float]:
    group = lorun.stage_map.groups[0]
    return {name: term.scaling for name, term in terms_of(lorun.adapter_of(group, group.sites[0])).items()}


@pytest.fixture
def net() -> nn.Module:
    return ListOfDenoisers([dncnn(16, 5) for _ in range(4)]).eval()


# --- what is adapted -----------------------------------------------------------------------------


def test_by_default_where_it_is_smaller(net: nn.Module) -> None:
    lorun = convert(net, rank=2)
    assert adapted(lorun) == {"layers.0.weight": 2, "layers.2.weight": 2, "layers.5.weight": 2, "layers.8.weight": 2}
    assert convert(net).peft_config["default"].r == 8
    assert adapted(convert(net, rank=8)) == {"layers.2.weight": 8, "layers.5.weight": 8, "layers.8.weight": 8}
    small = convert(net, rank=15)
    assert adapted(small) == {}  # 15 * (16 + 144) > 16 * 144
    assert relative(small(*ZOO["list_of_dncnns"]().inputs), net(*ZOO["list_of_dncnns"]().inputs)) < 1e-6


def test_rank_as_a_share_of_energy(net: nn.Module) -> None:
    low, high = convert(net, energy=0.2), convert(net, energy=0.6)
    name = "layers.5.weight"
    assert adapted(low)[name] < adapted(high)[name]
    stacks = torch.stack([d.get_parameter(name) for d in net.denoisers]).flatten(2)
    assert adapted(low)[name] == rank_for_energy(stacks, 0.2)
    assert scalings(low)[name] == 1


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "8", float("nan")])
def test_impossible_ranks(net: nn.Module, rank) -> None:
    with pytest.raises(LoRunError, match="rank"):
        convert(net, rank=rank)
    if isinstance(rank, int) and not isinstance(rank, bool):
        with pytest.raises(LoRunError, match="rank"):
            convert(net, LoraConfig(rank_pattern={"layers.2": rank}))


def test_config_and_rank_together(net: nn.Module) -> None:
    with pytest.raises(LoRunError, match="config and rank exclude each other"):
        convert(net, LoraConfig(), rank=4)


def test_target_modules(net: nn.Module) -> None:
    assert adapted(convert(net, LoraConfig(target_modules=["layers.2", "8"], r=4))) == {
        "layers.2.weight": 4,
        "layers.8.weight": 4,
    }
    assert adapted(convert(net, LoraConfig(target_modules=r"layers\.[25]", r=4))) == {
        "layers.2.weight": 4,
        "layers.5.weight": 4,
    }
    with pytest.raises(LoRunError, match="match no tensor of a denoiser"):
        convert(net, LoraConfig(target_modules=["nothing"]))


def test_targets_match_as_peft_matches() -> None:
    """Which tensors get a term here are those of the layers that PEFT wraps."""
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    net = ListOfDenoisers([Attention() for _ in range(3)])
    for options in (
        {"target_modules": ["mlp.0"]},
        {"target_modules": r".*mlp\.[02]"},
        {"target_modules": "all-linear", "exclude_modules": ["out_proj", "attend"]},
        {"target_modules": ["0", "2"], "exclude_modules": r"mlp\.2"},
        {"target_modules": ["0", "2"], "rank_pattern": {"0": 3}, "alpha_pattern": {"mlp.2": 32}, "use_rslora": True},
        {"target_modules": ["0"], "modules_to_save": ["norm"]},
    ):
        config = LoraConfig(r=2, **options)
        ours = convert(net, config)
        wrapped = get_peft_model(net.denoisers[0].__class__(), LoraConfig(r=2, **options))
        layers = {
            n.removeprefix("base_model.model.") + ".weight": m
            for n, m in wrapped.named_modules()
            if isinstance(m, LoraLayer)
        }
        assert adapted(ours) == {name: layer.r["default"] for name, layer in layers.items()}
        assert scalings(ours) == pytest.approx({name: layer.scaling["default"] for name, layer in layers.items()})


def test_target_parameters() -> None:
    case = ZOO["list_of_raw_kernels"]()
    lorun = convert(case.net, LoraConfig(r=2, target_parameters=["inner"], rank_pattern={"inner": 3}))
    assert adapted(lorun) == {"inner": 3}
    with pytest.raises(LoRunError, match="two dimensions"):
        convert(case.net, LoraConfig(target_parameters=["threshold"]))


def test_modules_to_save_stay_private(net: nn.Module) -> None:
    lorun = convert(net, LoraConfig(r=2, modules_to_save=["layers.5"]))
    assert "layers.5.weight" not in adapted(lorun)
    group = lorun.stage_map.groups[0]
    for site, denoiser in zip(group.sites, net.denoisers):
        kept = private_tensors(lorun.adapter_of(group, site))["layers.5.weight"]
        assert torch.equal(kept, denoiser.layers[5].weight) and kept.requires_grad
    with pytest.raises(LoRunError, match="modules_to_save"):
        convert(net, LoraConfig(modules_to_save=["nothing"]))


def test_named_targets_are_adapted_whatever_their_size(net: nn.Module) -> None:
    with pytest.warns(UserWarning, match="larger than the tensor"):
        lorun = convert(net, LoraConfig(r=9, target_modules=["layers.0"]))
    assert adapted(lorun) == {"layers.0.weight": 9}
    with pytest.warns(UserWarning, match="above the limit of 'layers.0.weight': 9 is used"):
        lorun = convert(net, LoraConfig(r=64, lora_alpha=128, target_modules=["layers.0"]))
    assert adapted(lorun) == {"layers.0.weight": 9} and scalings(lorun) == {"layers.0.weight": 2}


@pytest.mark.parametrize(
    "options",
    [
        {"lora_dropout": 0.1},
        {"bias": "all"},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"fan_in_fan_out": True},
        {"layers_to_transform": [0], "target_modules": ["0"]},
        {"task_type": "CAUSAL_LM"},
    ],
)
def test_options_without_a_meaning_are_errors(net: nn.Module, options) -> None:
    with pytest.raises(LoRunError, match=next(iter(options))):
        convert(net, LoraConfig(**options))


def test_another_kind_of_config_is_an_error(net: nn.Module) -> None:
    from peft import IA3Config

    with pytest.raises(LoRunError, match="IA3Config"):
        convert(net, IA3Config())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_an_error(net: nn.Module, value: float) -> None:
    net.denoisers[2].layers[5].weight.data[0, 0] = value
    with pytest.raises(LoRunError, match="NaN or Inf in 'denoisers.2.layers.5.weight'"):
        convert(net)


def test_weight_norm_is_an_error_with_the_way_out() -> None:
    utils = torch.nn.utils
    for norm, way_out in (
        (utils.weight_norm, utils.remove_weight_norm),
        (utils.spectral_norm, utils.remove_spectral_norm),
        (utils.parametrizations.weight_norm, None),
        (utils.parametrizations.spectral_norm, None),
    ):
        net = ListOfDenoisers([Denoiser() for _ in range(3)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for denoiser in net.denoisers:
                norm(denoiser.body)
        name = way_out.__name__ if way_out else "remove_parametrizations"
        with torch.no_grad(), pytest.raises(LoRunError, match=rf"denoisers.0.body.*remove it first.*{name}"):
            convert(net)
        for denoiser in net.denoisers:
            if way_out:
                way_out(denoiser.body)
            else:
                utils.parametrize.remove_parametrizations(denoiser.body, "weight")
        convert(net)


def test_recurrent_weights_stay_private() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(8, 32, batch_first=True)
            self.out = nn.Linear(32, 8)

        def forward(self, x):
            return x + self.out(self.rnn(x[:, 0])[0])[:, None]

    net = ListOfDenoisers([Recurrent() for _ in range(3)])
    inputs = ZOO["list_of_denoisers"]().inputs
    lorun = convert(net, rank=4)
    assert set(adapted(lorun)) == {"out.weight"}
    with torch.no_grad():
        net.denoisers[1].out.weight.copy_(net.denoisers[0].out.weight)
        net.denoisers[2].out.weight.copy_(net.denoisers[0].out.weight)
    assert relative(convert(net, rank=4)(*inputs), net(*inputs)) < 1e-6


def test_tied_tensors_within_a_stage_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(1, 1, 5, padding=2)
            self.b = nn.Conv2d(1, 1, 5, padding=2)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    net = ListOfDenoisers([Tied() for _ in range(3)])
    with pytest.warns(UserWarning, match="larger"):
        lorun = convert(net, LoraConfig(r=1, target_modules=["a"]))
    assert [torch.equal(denoiser.a.weight, denoiser.b.weight) for denoiser in lorun.network.denoisers] == [True] * 3
    merged = lorun.merge_and_unload()
    assert [denoiser.a.weight is denoiser.b.weight for denoiser in merged.denoisers] == [True] * 3


def test_constants_are_kept_once() -> None:
    class Masked(Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("index", torch.arange(64).reshape(8, 8))

    net = ListOfDenoisers([Masked() for _ in range(3)])
    lorun = convert(net, rank=2)
    assert [spec.name for spec in lorun.stage_map.groups[0].tensors if spec.common] == ["index"]
    assert "index" not in private_tensors(lorun.adapters["default"]["stage_00"]["denoiser"])


# --- figures and PEFT ----------------------------------------------------------------------------


def test_report(net: nn.Module) -> None:
    lorun = convert(net, rank=2)
    report = lorun.report()
    assert report.network_before.num_parameters == sum(p.numel() for p in net.parameters())
    assert report.network_before.num_bytes == sum(t.numel() * t.element_size() for t in net.state_dict().values())
    assert report.network_after.num_parameters == lorun.num_parameters()
    assert report.denoisers_before.num_parameters == sum(p.numel() for p in net.denoisers.parameters())
    assert sum(item.after.num_parameters for item in report.stages) + report.base.num_parameters == (
        report.denoisers_after.num_parameters
    )
    group = lorun.stage_map.groups[0]
    for item, denoiser in zip(report.stages, net.denoisers):
        assert set(item.residuals) == set(adapted(lorun))
        weight = lorun.merge_and_unload().denoisers[item.stage].layers[11].weight
        if not hidden_channels(denoiser):
            assert item.residuals["layers.11.weight"] == pytest.approx(
                relative(weight, denoiser.layers[11].weight), rel=1e-3
            )
    assert "whole network" in str(report) and f"{lorun.num_parameters():,}" in str(report)
    assert len(group.sites) == len(report.stages)


def test_report_of_a_loop_counts_the_module_once() -> None:
    case = ZOO["looped"]()
    report = convert(case.net, rank=1, **case.find()).report()
    assert report.network_before.num_parameters == sum(p.numel() for p in case.net.parameters())
    assert report.relative_error == 0


def test_layers_of_one_dimension() -> None:
    net = ListOfDenoisers([Layers(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3)])
    inputs = ZOO["list_of_denoisers"]().inputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lorun = convert(net, LoraConfig(r=8, target_modules="all-linear"))
    assert relative(lorun(*inputs), net(*inputs)) < 1e-5


# --- networks as people write them ---------------------------------------------------------------


def test_what_the_authors_froze_stays_frozen(tmp_path) -> None:
    class Transformed(Denoiser):
        def __init__(self, k: int) -> None:
            super().__init__()
            self.dct = nn.Parameter(torch.eye(8), requires_grad=False)
            self.noise = nn.Parameter(torch.full((2, 2), float(k)), requires_grad=False)

        def forward(self, x):
            return super().forward(x @ self.dct) + 0 * self.noise.sum()

    net = ListOfDenoisers([Transformed(k) for k in range(3)])
    lorun = convert(net, rank=1)
    specs = {spec.name: spec for spec in lorun.stage_map.groups[0].tensors}
    assert specs["dct"].common and not specs["noise"].common and not specs["noise"].adaptable
    lorun.save_pretrained(tmp_path / "saved")
    for model in (lorun, lorun_adapt.from_pretrained(tmp_path / "saved", net)):
        assert not {"noise", "dct"} & {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
        assert float(model.network.denoisers[2].noise.sum()) == 8
    assert not lorun.merge_and_unload().denoisers[0].dct.requires_grad
    net.requires_grad_(False)  # frozen as a whole, for inference: its stages are adapted all the same
    assert set(lorun.stage_map.ranks["denoiser"]) < set(convert(net, rank=1).stage_map.ranks["denoiser"])


def test_an_operator_used_outside_the_stages_stays_the_base() -> None:
    class Operator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.rand(8, 8))

        def forward(self, x):
            return x @ self.kernel

    class Uses(Block):
        def __init__(self, operator: nn.Module) -> None:
            super().__init__(Denoiser())
            self.operator = operator

        def forward(self, x, y, mask):
            return super().forward(self.operator(x), y, mask)

    class Net(ListOfBlocks):
        def __init__(self) -> None:
            operator = Operator()
            super().__init__([Uses(operator) for _ in range(3)])
            self.operator = operator

        def forward(self, y, mask):
            return super().forward(self.operator(y), mask)

    net = Net()
    lorun = convert(net, rank=2)
    for term in terms_of(lorun.adapters["default"]["stage_00"]["denoiser"]).values():
        nn.init.ones_(term.lora_B)
    kernels = [lorun.network.operator.kernel, *(block.operator.kernel for block in lorun.network.blocks)]
    assert [torch.equal(kernel, net.operator.kernel) for kernel in kernels] == [True, False, True, True]


def test_activations_kept_as_attributes() -> None:
    class Keeps(Denoiser):
        def forward(self, x):
            self.feature = torch.relu(self.head(x))
            return x + self.tail(torch.relu(self.body(self.feature)))

    net = ListOfDenoisers([Keeps() for _ in range(3)])
    inputs = ZOO["list_of_denoisers"]().inputs
    net(*inputs)
    kept = net.denoisers[0].feature
    lorun = convert(net, rank=2)
    assert net.denoisers[0].feature is kept
    expected = lorun(*inputs)
    with lorun.disable_adapter():
        lorun(*inputs)
        with lorun.disable_adapter():
            pass
        assert torch.equal(lorun(*inputs), lorun.base(*inputs))
    assert torch.equal(lorun(*inputs), expected)


@pytest.mark.parametrize(
    "hide",
    [
        lambda d: setattr(d, "kernels", [d.body.weight]),
        lambda d: setattr(d, "run", lambda x, kernel=d.body.weight: F.conv2d(x, kernel)),
        lambda d: setattr(d, "run", {"body": partial(F.conv2d, weight=d.body.weight)}),
        lambda d: setattr(d, "_run", lambda x, kernel=d.body.weight: F.conv2d(x, kernel)),
        lambda d: setattr(d, "_kernels", [d.body.weight]),
        lambda d: d.register_forward_hook(lambda *_, kernel=d.body.weight: None),
    ],
)
def test_parameters_out_of_reach_are_an_error(hide) -> None:
    net = ListOfDenoisers([Denoiser() for _ in range(3)])
    hide(net.denoisers[1])
    with pytest.raises(LoRunError, match=r"denoisers.1.*'(kernels|run|_run|_kernels|_forward_hooks)'"):
        convert(net)


def test_a_conversion_that_grows_says_so() -> None:
    for name in ("looped", "one_block_many_times"):
        case = ZOO[name]()
        with pytest.warns(UserWarning, match=r"grows from .*times as many: its stages shared a denoiser already"):
            convert(case.net, rank=2, **case.find())
    net = ZOO["list_of_blocks"]().net
    config = LoraConfig(r=60, target_parameters=["denoiser.head.weight", "denoiser.body.weight"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert(net, config)
        convert(net, rank=2)
    assert sum("choose a lower rank" in str(warning.message) for warning in caught) == 1


class Ordered(OrderedDict):
    __getattr__ = OrderedDict.__getitem__


class Default(defaultdict):
    def __getattr__(self, name: str) -> object:
        return self[name]


class Slotted(dict):
    __slots__ = ("note",)
    __getattr__ = dict.__getitem__


@pytest.mark.parametrize("kind", [Ordered, Default, Slotted])
def test_dicts_whose_keys_are_attributes(kind) -> None:
    case = ZOO["list_of_blocks"]()
    settings = kind(list) if kind is Default else kind()
    settings["b"], settings["a"] = case.net.blocks[0].step, [1]
    if kind is Slotted:
        settings.note = "mine"
    case.net.settings = settings
    copied = convert(case.net, rank=2).base.settings
    assert type(copied) is kind and list(copied) == ["b", "a"] and copied["a"] == [1]
    assert copied["b"] is not settings["b"] and (kind is not Default or copied["new"] == [])
    assert kind is not Slotted or copied.note == "mine"


class Settings(dict):
    """A dict whose keys are attributes, as configs often are; it raises KeyError for others."""

    def __getattr__(self, name: str) -> object:
        return self[name]


def buffer(value: torch.Tensor):
    return lambda net: [net.register_buffer("extra", value), *(b.register_buffer("extra", value) for b in net.blocks)]


def attribute(value: object):
    return lambda net: [setattr(module, "extra", value) for module in (net, *net.blocks)]


@pytest.mark.parametrize(
    "change",
    [
        attribute(threading.Lock()),
        attribute([threading.RLock()]),
        attribute(threading.Condition()),
        attribute(F),
        attribute(Settings(width=8, kernels=[3, Settings(a=1)])),
        attribute(torch.Generator()),
        attribute(logging.getLogger("net")),
        buffer(torch.ones(3, dtype=torch.complex64)),
        buffer(torch.ones(3, dtype=torch.int8)),
    ],
    ids=["lock", "locks", "condition", "python module", "settings", "generator", "logger", "complex", "integers"],
)
def test_what_networks_keep_beside_their_weights(change, tmp_path) -> None:
    case = ZOO["list_of_blocks"]()
    change(case.net)
    lorun = convert(case.net, rank=2, example_inputs=case.inputs)
    expected = lorun(*case.inputs)
    lorun.save_pretrained(tmp_path / "saved")
    assert torch.equal(lorun_adapt.from_pretrained(tmp_path / "saved", case.net)(*case.inputs), expected)
    assert torch.equal(copy.deepcopy(lorun)(*case.inputs), expected)
    assert lorun.recover(case.net, [case.inputs], steps=2)
    held = lorun.base.blocks[0].extra
    if isinstance(held, Settings):
        assert held == case.net.blocks[0].extra and held.kernels[1] is not case.net.blocks[0].extra.kernels[1]


def scripted(net: nn.Module) -> None:
    net.blocks[1].denoiser = torch.jit.script(net.blocks[1].denoiser)


def test_one_frozen_stage_does_not_freeze_the_others() -> None:
    case = ZOO["list_of_blocks"]()
    case.net.blocks[0].requires_grad_(False)
    lorun = convert(case.net, rank=1)
    assert lorun.num_parameters() == convert(case.net.requires_grad_(True), rank=1).num_parameters()
    assert all(parameter.requires_grad for parameter in lorun.adapters.parameters())
    case.net.blocks.requires_grad_(False)
    case.net.register_parameter("trains", nn.Parameter(torch.zeros(1)))
    with pytest.warns(
        UserWarning, match=r"grows .*: no tensor of its stages is adapted, .* call requires_grad_\(True\)"
    ):
        convert(case.net, rank=1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change, message",
    [
        (buffer(torch.eye(3).to_sparse()), "expected a dense tensor with values, found torch.sparse_coo in 'extra'"),
        (lambda net: buffer(torch.eye(3).to_sparse_csr())(net), "extra of ListOfBlocks"),
        (buffer(torch.ones(3).to(torch.float8_e4m3fn)), "cannot store the torch.float8_e4m3fn of 'extra'"),
        (lambda net: buffer(torch.ones(3).to(torch.complex32))(net), "cannot store the torch.complex32 of 'extra'"),
        (
            lambda net: buffer(torch.ones(3).to(torch.complex128))(net),
            "'extra': convert a network of torch.complex64",
        ),
        (attribute(i for i in range(3)), "cannot copy extra of ListOfBlocks .*generator"),
        (scripted, "blocks.1.denoiser is TorchScript, .* before torch.jit.script"),
        (lambda net: setattr(net, "lazy", nn.LazyLinear(3)), "lazy is lazy, without weights yet: run the network once"),
        (lambda net: setattr(net.blocks[0], "extra", nn.LazyLinear(3)), "blocks.0.extra is lazy"),
    ],
)
def test_what_cannot_be_converted_or_saved_is_said(change, message, tmp_path) -> None:
    case = ZOO["list_of_blocks"]()
    change(case.net)
    with pytest.raises(LoRunError, match=message):
        convert(case.net, rank=2, example_inputs=case.inputs).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
