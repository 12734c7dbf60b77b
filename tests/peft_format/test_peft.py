"""Between PEFT and this library: what one writes the other reads, or refuses."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conversions import all_tensors, relative, train_a_bit
from dun_zoo import ZOO, Denoiser, Layers, ListOfDenoisers, PairBlocks, dncnn
from peft import LoraConfig, PeftModel, get_peft_model
from peft_readers import READERS
from torch import Tensor, nn

import lorun_adapt
from lorun_adapt import LoRunError, LoRunModel

BIASES = (
    "ignore:`lora_bias=True` was passed",  # PEFT, where only some of the layers have a bias
    "ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape",  # PEFT 0.21 of lora_B.bias
)
pytestmark = [pytest.mark.filterwarnings(item) for item in BIASES]


class Flat(nn.Module):
    """Layers for vectors, sequences or volumes on an image."""

    def __init__(self, shape: tuple[int, ...], *layers: nn.Module) -> None:
        super().__init__()
        self.shape = shape
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.layers(x.reshape(-1, *self.shape)).reshape(x.shape)


class Head(nn.Module):
    """Names that end alike: ``head``, ``ahead`` and ``body.head``; dots that a pattern could take for any letter."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.BatchNorm2d(1)
        self.ahead = nn.Conv2d(1, 8, 3, padding=1)
        self.body = nn.ModuleDict({"head": nn.Conv2d(8, 8, 3, padding="same"), "norm": nn.GroupNorm(2, 8)})
        self.bodyxhead = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.mix = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.body["norm"](self.body["head"](F.relu(self.ahead(self.head(x)))))
        return x + 0.1 * self.last(F.relu(self.mix(self.bodyxhead(F.relu(inner)))))


DENOISERS: dict[str, Callable[[], nn.Module]] = {
    "conv2d": Denoiser,
    "dncnn": lambda: dncnn(12, 14),
    "plain_sequential": lambda: dncnn(12, 14).layers,  # names "0", "2", … "40"
    "linear": lambda: Layers(nn.Linear(8, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 8, bias=False)),
    "linear_no_bias": lambda: Layers(nn.Linear(8, 24, bias=False), nn.ReLU(), nn.Linear(24, 8, bias=False)),
    "conv1d": lambda: Flat((8, 8), nn.Conv1d(8, 24, 3, padding=1), nn.BatchNorm1d(24), nn.Conv1d(24, 8, 1)),
    "conv3d": lambda: Flat(
        (1, 2, 4, 8), nn.Conv3d(1, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.ReLU(), nn.Conv3d(12, 1, 3, padding=1)
    ),
    "strided": lambda: Flat(
        (1, 8, 8), nn.Conv2d(1, 8, 2, stride=2), nn.BatchNorm2d(8, affine=False), nn.PReLU(8), nn.Conv2d(8, 4, 1)
    ),
    "names": Head,
}


def network(make: Callable[[], nn.Module]) -> ListOfDenoisers:
    net = ListOfDenoisers([make() for _ in range(3)]).eval()
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if name.endswith(("bias", "running_mean")):
            nn.init.normal_(tensor, 0, 0.1)
        elif tensor.ndim > 1:
            nn.init.kaiming_normal_(tensor)  # so that the first of many layers still shows in the output
    return net


def image() -> Tensor:
    return torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def check_stages(lorun: LoRunModel, folder: Path) -> None:
    """Every stage's folder is, in PEFT, that stage; all of them in one PeftModel too."""
    lorun.eval().save_pretrained(folder)
    assert "refuses" not in (folder / "README.md").read_text()
    x, together = image(), None
    for stage in range(3):
        place = str(folder / f"adapters/default/stage_{stage:02d}")
        expected = lorun.network.denoisers[stage](x).detach()
        loaded = PeftModel.from_pretrained(lorun.base_denoiser(), place).eval()
        assert relative(loaded(x), expected) < 1e-5
        if together is None:
            together = PeftModel.from_pretrained(lorun.base_denoiser(), place, adapter_name="stage0").eval()
        else:
            together.load_adapter(place, f"stage{stage}")
    for stage in (2, 0, 1, 0):
        together.set_adapter(f"stage{stage}")
        assert relative(together(x), lorun.network.denoisers[stage](x)) < 1e-5
    with together.disable_adapter():
        assert relative(together(x), lorun.base_denoiser()(x)) < 1e-5


@pytest.mark.parametrize("name", DENOISERS)
def test_peft_reads_each_stage(name: str, tmp_path: Path) -> None:
    net = network(DENOISERS[name])
    for rank in (1, 2):
        lorun = lorun_adapt.convert(net, rank=rank)
        train_a_bit(lorun, ZOO["list_of_denoisers"]().inputs)
        check_stages(lorun, tmp_path / str(rank))


def test_peft_reads_patterns_and_rslora(tmp_path: Path) -> None:
    config = LoraConfig(
        r=2, lora_alpha=3, use_rslora=True, target_modules=r".*\.(5|8|11)", rank_pattern={"layers.5": 4}
    )
    config.alpha_pattern = {"layers.8": 0.7}
    lorun = lorun_adapt.convert(network(DENOISERS["dncnn"]), config)
    train_a_bit(lorun, ZOO["list_of_denoisers"]().inputs)
    check_stages(lorun, tmp_path / "saved")
    written = LoraConfig.from_pretrained(str(tmp_path / "saved/adapters/default/stage_01"))
    assert {written.r, *written.rank_pattern.values()} == {2, 4} and not written.use_rslora


def test_the_base_denoiser_is_a_copy_of_its_own() -> None:
    lorun = lorun_adapt.convert(network(Denoiser), rank=2)
    denoiser = lorun.base_denoiser()
    assert type(denoiser) is Denoiser and relative(denoiser(image()), lorun.base.denoisers[1](image())) == 0
    nn.init.zeros_(denoiser.body.weight)
    assert bool(lorun.base.denoisers[0].body.weight.any())
    pair = lorun_adapt.convert(ZOO["pair_blocks"]().net, rank=2)
    with pytest.raises(LoRunError, match=r"among \['blocks_encoder', 'blocks_decoder'\], found None"):
        pair.base_denoiser()
    blocks = pair.base
    assert isinstance(blocks, PairBlocks)
    assert type(pair.base_denoiser("blocks_decoder")) is type(blocks.blocks[0].decoder)


# --- what PEFT can't represent -------------------------------------------------------------------


class ReadsWeights(Denoiser):
    """Its layer's weight is used past the layer."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.tail(self._inner(F.relu(self.head(x))))

    def _inner(self, x: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, self.body.weight, self.body.bias, padding=1))


def through_a_function(layer: nn.Module, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight, padding=1)


class ReadsThroughAFunction(Denoiser):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.tail(through_a_function(self.body, self.head(x)))


class OwnScale(nn.Module):
    """A layer of the authors' own, whose forward reads its own weight: that is all right."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Tied(Denoiser):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(8, 8, 3, padding=1)
        self.other.weight = self.body.weight


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "reads_weights": (lambda: network(ReadsWeights), "the code of ReadsWeights"),
    "reads_through_a_function": (lambda: network(ReadsThroughAFunction), "the code of ReadsThroughAFunction"),
    "tied": (lambda: network(Tied), "ties tensors"),
    "dilated": (ZOO["dilated"], "dilation="),
    "reflect_padded": (ZOO["reflect_padded"], "padding_mode='reflect'"),
    "transposed": (ZOO["transposed"], "the weight of ConvTranspose2d"),
    "grouped": (ZOO["grouped"], "2 groups"),
    "depthwise": (ZOO["depthwise"], "8 groups"),
    "list_of_raw_kernels": (ZOO["list_of_raw_kernels"], "of RawKernels"),
    "list_of_blocks": (ZOO["list_of_blocks"], "private tensor step"),
    "attention": (ZOO["attention"], "MultiheadAttention|of Attention"),
    "nothing_adapted": (lambda: network(lambda: Layers(nn.Linear(8, 2), nn.Linear(2, 8))), "no adapted tensor"),
    "one_layer": (lambda: network(lambda: nn.Conv2d(1, 1, 7, padding=3)), "a single layer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_peft_refuses_what_it_would_get_wrong(name: str, tmp_path: Path) -> None:
    made, reason = REFUSED[name][0](), REFUSED[name][1]
    net = made if isinstance(made, nn.Module) else made.net
    stages = {"stages": "denoisers.*"} if name == "one_layer" else {}
    config = LoraConfig(r=2, target_parameters=all_tensors(net, **stages))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "nothing_adapted":
            lorun = lorun_adapt.convert(net, rank=8)
        else:
            lorun = lorun_adapt.convert(net, config, **stages)
    lorun.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved/README.md").read_text()
    assert "`PeftModel.from_pretrained` refuses" in card and re.search(reason, card)
    for stage in range(len(lorun.stage_map)):
        with pytest.raises(ValueError):
            PeftModel.from_pretrained(
                lorun.base_denoiser(), str(tmp_path / f"saved/adapters/default/stage_{stage:02d}")
            )
    fresh = copy.deepcopy(net)
    assert torch.equal(
        lorun_adapt.from_pretrained(tmp_path / "saved", fresh).merge_and_unload().state_dict()[(key := _key(net))],
        lorun.merge_and_unload().state_dict()[key],
    )


@pytest.mark.parametrize("reader", READERS, ids=lambda kind: kind.__name__)
def test_code_that_goes_past_a_layer(reader: type[nn.Module], tmp_path: Path) -> None:
    """PEFT must not load such a stage, and an adapter of PEFT's for it must not load here."""
    lorun = lorun_adapt.convert(network(reader), rank=2)
    lorun.save_pretrained(tmp_path / "saved")
    assert "`PeftModel.from_pretrained` refuses" in (tmp_path / "saved/README.md").read_text()
    for stage in range(3):
        with pytest.raises(ValueError):
            PeftModel.from_pretrained(
                lorun.base_denoiser(), str(tmp_path / f"saved/adapters/default/stage_{stage:02d}")
            )
    target = "head" if reader.__name__ == "OwnLayerThatIsRead" else "body"
    get_peft_model(lorun.base_denoiser(), LoraConfig(r=1, target_modules=[target])).save_pretrained(
        tmp_path / "trained"
    )
    with pytest.raises(LoRunError):
        lorun.load_adapter(tmp_path / "trained", "trained", stage=0)
    lorun_adapt.from_pretrained(tmp_path / "saved", network(reader))


@pytest.mark.parametrize("name", ["out", "t", "layer", "r"])
def test_names_that_end_peft_s_own(name: str, tmp_path: Path) -> None:
    """``lora_dropout`` ends in ``out``."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(1, 8, 3, padding=1)
            self.add_module(name, nn.Conv2d(8, 1, 3, padding=1))

        def forward(self, x: Tensor) -> Tensor:
            return x + 0.1 * self._modules[name](F.relu(self.body(x)))

    check_stages(lorun_adapt.convert(network(Named), rank=2), tmp_path / "saved")


@pytest.mark.parametrize("attribute", ["number", "buffer", "eps"])
def test_stages_that_differ_in_no_tensor(attribute: str, tmp_path: Path) -> None:
    net = network(lambda: Layers(nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 1, 3, padding=1)))
    for k, denoiser in enumerate(net.denoisers):
        if attribute == "number":
            denoiser.k = k
        elif attribute == "buffer":
            denoiser.register_buffer("k", torch.tensor(k), persistent=False)
        else:
            denoiser.layers[1].eps = 0.1 * (k + 1)
    lorun = lorun_adapt.convert(net, rank=2)
    lorun.save_pretrained(tmp_path / "saved")
    assert "the stages differ in" in (tmp_path / "saved/README.md").read_text()
    PeftModel.from_pretrained(lorun.base_denoiser(), str(tmp_path / "saved/adapters/default/stage_00"))
    with pytest.raises(ValueError):
        PeftModel.from_pretrained(lorun.base_denoiser(), str(tmp_path / "saved/adapters/default/stage_01"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", DENOISERS)
def test_smaller_files_say_the_same_to_both(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    lorun = lorun_adapt.convert(network(DENOISERS[name]), rank=2)
    train_a_bit(lorun, ZOO["list_of_denoisers"]().inputs)
    lorun.save_pretrained(tmp_path / "half", dtype=dtype)
    loaded = lorun_adapt.from_pretrained(tmp_path / "half", network(DENOISERS[name])).eval()
    for stage in range(3):
        place = str(tmp_path / f"half/adapters/default/stage_{stage:02d}")
        model = PeftModel.from_pretrained(loaded.base_denoiser(), place).eval()
        assert relative(model(image()), loaded.network.denoisers[stage](image())) < 1e-5


def _key(net: nn.Module) -> str:
    return next(name for name, tensor in net.state_dict().items() if tensor.ndim >= 2)


def test_code_that_reads_its_own_weight_is_no_obstacle(tmp_path: Path) -> None:
    make = lambda: Flat((1, 8, 8), nn.Conv2d(1, 8, 3, padding=1), OwnScale(), nn.Conv2d(8, 1, 3, padding=1))  # noqa: E731
    lorun = lorun_adapt.convert(network(make), rank=2)
    train_a_bit(lorun, ZOO["list_of_denoisers"]().inputs)
    check_stages(lorun, tmp_path / "saved")


# --- what PEFT has trained -----------------------------------------------------------------------

PEFT_TRAINS = {
    "default": ("conv2d", {"target_modules": ["head", "body"]}),
    "rank_above_a_limit": ("conv2d", {"r": 12, "target_modules": ["head", "body", "tail"]}),
    "rslora": ("dncnn", {"use_rslora": True, "lora_alpha": 5, "target_modules": r"layers\.\d+\.?"}),
    "patterns": (
        "plain_sequential",
        {
            "target_modules": ["2", "5", "8", "11", "14"],
            "rank_pattern": {"5": 3, "^14$": 1},
            "alpha_pattern": {r"1\d": 2, "8": 9},
        },
    ),
    "excluded": ("conv2d", {"target_modules": ["head", "body"], "exclude_modules": "hea.*"}),
    "biases": ("conv2d", {"target_modules": ["head", "tail"], "lora_bias": True}),
    "biases_rslora": ("conv1d", {"target_modules": ["0", "2"], "lora_bias": True, "use_rslora": True}),
    "saved_modules": (
        "dncnn",
        {"target_modules": ["layers.2", "layers.8"], "modules_to_save": ["layers.0", "layers.3"]},
    ),
    "saved_by_suffix": ("linear", {"target_modules": ["0"], "modules_to_save": ["1"]}),
    "linear": ("linear", {"target_modules": "all-linear", "r": 8}),
    "conv3d": ("conv3d", {"target_modules": ["0", "3"], "modules_to_save": ["1"]}),
    "dropout": ("conv2d", {"target_modules": ["body"], "lora_dropout": 0.5}),
    "gaussian": ("conv2d", {"target_modules": ["body"], "init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", PEFT_TRAINS)
@pytest.mark.filterwarnings("ignore:rank .* is above the limit", "ignore:lora_dropout", "ignore:lora_bias=True")
def test_what_peft_trained_loads(name: str, half: bool, tmp_path: Path) -> None:
    kind, options = PEFT_TRAINS[name]
    lorun = lorun_adapt.convert(network(DENOISERS[kind]), rank=2)
    if name == "rslora":
        layers = [n for n, m in lorun.base_denoiser().named_modules() if isinstance(m, nn.Conv2d)]
        options = {**options, "target_modules": "|".join(map(re.escape, layers))}
    model = get_peft_model(lorun.base_denoiser(), LoraConfig(**{"r": 2, **options}))
    x = image()
    model.eval()  # PEFT leaves a norm's running statistics where the base keeps them
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 0.5).square().sum().backward()
        optimizer.step()
    for parameter in model.parameters():
        if parameter.requires_grad:  # so that it shows
            parameter.data += 0.3 * torch.randn_like(parameter)
    if half:
        for module in model.modules():
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                module.half()
    model.save_pretrained(str(tmp_path / "trained"))
    reloaded = PeftModel.from_pretrained(lorun.base_denoiser(), str(tmp_path / "trained")).eval().float()
    expected = reloaded(x).detach()
    assert relative(expected, lorun.base_denoiser()(x)) > 1e-4
    lorun.load_adapter(tmp_path / "trained", "peft", stage=1)
    lorun.set_adapter({1: "peft"})
    assert relative(lorun.eval().network.denoisers[1](x), expected) < 1e-5
    lorun.save_pretrained(tmp_path / "again")
    loaded = lorun_adapt.from_pretrained(tmp_path / "again", network(DENOISERS[kind])).eval()
    assert loaded.active_adapters == {0: "default", 1: "peft", 2: "default"}
    assert torch.equal(loaded.network.denoisers[1](x), lorun.network.denoisers[1](x))


def test_a_whole_set_of_peft(tmp_path: Path) -> None:
    lorun = lorun_adapt.convert(network(Denoiser), rank=2).eval()
    expected, x = [], image()
    for stage in range(3):
        model = get_peft_model(lorun.base_denoiser(), LoraConfig(r=stage + 1, target_modules=["body"])).eval()
        nn.init.normal_(model.base_model.model.body.lora_B["default"].weight)
        model.save_pretrained(str(tmp_path / f"set/stage_{stage:02d}"))
        expected.append(model(x).detach())
    lorun.load_adapter(tmp_path / "set", "mine")
    lorun.set_adapter("mine")
    for stage in range(3):
        assert relative(lorun.network.denoisers[stage](x), expected[stage]) < 1e-5


@pytest.fixture
def trained(tmp_path: Path) -> tuple[LoRunModel, Path]:
    lorun = lorun_adapt.convert(network(Denoiser), rank=2).eval()
    model = get_peft_model(lorun.base_denoiser(), LoraConfig(r=2, target_modules=["body", "head"]))
    model.save_pretrained(str(tmp_path / "trained"))
    return lorun, tmp_path / "trained"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'LORA'"),
        ({"peft_type": ["LORA"]}, "peft_type 'LORA'"),
        ({"use_dora": True}, "no use_dora"),
        ({"bias": "all"}, "no bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights, found 'pissa'"),
        ({"layers_to_transform": [1]}, "no layers_to_transform"),
        ({"fan_in_fan_out": True}, "no fan_in_fan_out"),
        ({"target_parameters": ["body.weight"]}, "no target_parameters"),
        ({"an_option_of_the_future": 3}, "no an_option_of_the_future"),
        ({"r": 0}, "a rank of 1 or more for r, found 0"),
        ({"r": -3}, "a rank of 1 or more for r, found -3"),
        ({"r": True}, "a rank of 1 or more for r, found True"),
        ({"r": 10**30}, "a rank of 1 or more for r"),
        ({"r": 4}, "factors of rank 4 for 'head.weight'"),
        ({"rank_pattern": {"head": 0}}, "ranks of 1 or more"),
        ({"rank_pattern": {"head": 3}}, "factors of rank 3 for 'head.weight'"),
        ({"rank_pattern": ["head"]}, "ranks of 1 or more"),
        ({"rank_pattern": {"(" * 50: 3}}, "ranks of 1 or more"),
        ({"rank_pattern": {"(a+)+$": 3}}, "ranks of 1 or more"),
        ({"rank_pattern": {"(.|.)" * 15: 3}}, "ranks of 1 or more"),
        ({"alpha_pattern": {f"{n}.*.*.*": 3 for n in range(99)}}, "patterns that are quick"),
        ({"target_modules": "(.*)*x"}, "names or a simple pattern"),
        ({"target_modules": {"body": 1}}, "names or a simple pattern"),
        ({"target_modules": ["body", "head", "tail"]}, "the factors of 'tail.weight'"),
        ({"target_modules": ["body"], "modules_to_save": ["tail"]}, "the tensor 'tail.weight'"),
        ({"modules_to_save": [["tail"]]}, "names for modules_to_save"),
        ({"lora_bias": True}, "the bias of 'head'"),
        ({"lora_alpha": "much"}, "a number other than 0, of 1e-6 to 1e9, for lora_alpha"),
        ({"lora_alpha": 0}, "a number other than 0, of 1e-6 to 1e9, for lora_alpha"),
        ({"lora_alpha": 1e39}, "of 1e-6 to 1e9, for lora_alpha"),
        ({"lora_alpha": 1e-300}, "of 1e-6 to 1e9, for lora_alpha"),
        ({"target_modules": "?:a"}, "names or a simple pattern"),
        ({"rank_pattern": {"?=head": 2}}, "ranks of 1 or more"),
        ({"modules_to_save": ["a)|(b"]}, "names for modules_to_save"),
        ({"exclude_modules": "[aĀȀ]" * 9}, "names or a simple pattern"),
        ({"alpha_pattern": {f"n{n}": 3 for n in range(5000)}}, "patterns that are quick"),
        ({"revision": 5}, "a name for revision"),
    ],
)
def test_configs_that_are_refused(trained, options: dict[str, object], message: str) -> None:
    lorun, folder = trained
    expected = lorun(*ZOO["list_of_denoisers"]().inputs)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))
    with pytest.raises(LoRunError, match=f"{re.escape(message)}.*: ") as caught:
        lorun.load_adapter(folder, "peft", stage=0)
    assert str(caught.value).startswith("expected ") and ", found " in str(caught.value)
    assert lorun.adapter_names == ["default"]
    assert torch.equal(lorun(*ZOO["list_of_denoisers"]().inputs), expected)


def test_a_bias_that_the_network_has_no_place_for(tmp_path: Path) -> None:
    lorun = lorun_adapt.convert(network(DENOISERS["linear_no_bias"]), rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(lorun.base_denoiser(), LoraConfig(r=2, target_modules=["layers.0"], lora_bias=True))
    nn.init.ones_(model.base_model.model.layers[0].lora_B["default"].bias)
    model.save_pretrained(str(tmp_path / "trained"))
    with pytest.raises(LoRunError, match="no bias for 'layers.0', which has none"):
        lorun.load_adapter(tmp_path / "trained", "peft", stage=0)


def test_dropout_is_not_dropped_in_silence(tmp_path: Path) -> None:
    lorun = lorun_adapt.convert(network(Denoiser), rank=2)
    model = get_peft_model(lorun.base_denoiser(), LoraConfig(r=2, target_modules=["body"], lora_dropout=0.1))
    model.save_pretrained(str(tmp_path / "trained"))
    with pytest.warns(UserWarning, match="lora_dropout .* is not applied"):
        lorun.load_adapter(tmp_path / "trained", "peft", stage=0)


def test_a_rank_above_the_limit_is_brought_down_to_it(tmp_path: Path) -> None:
    lorun = lorun_adapt.convert(network(Denoiser), rank=2)
    model = get_peft_model(lorun.base_denoiser(), LoraConfig(r=12, target_modules=["tail"]))
    model.save_pretrained(str(tmp_path / "trained"))
    with pytest.warns(UserWarning, match="rank 12 is above the limit of 'tail.weight' .*: 1 is used"):
        lorun.load_adapter(tmp_path / "trained", "peft", stage=0)
    assert lorun.adapters["peft"]["stage_00"]["denoiser"].get_submodule("tail/weight").rank == 1
    model = get_peft_model(lorun.base_denoiser(), LoraConfig(r=300, target_modules=["tail"]))
    model.save_pretrained(str(tmp_path / "huge"))
    with pytest.raises(LoRunError, match=r"lora_A.weight' of shape \(rank, 8, 3, 3\)"):
        lorun.load_adapter(tmp_path / "huge", "huge", stage=0)
