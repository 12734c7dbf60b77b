"""deepinv's unfolded networks: found, converted, recovered, trained in its own loop."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepinv
    from deepinv.models import MoDL, PDNet_DualBlock, PDNet_PrimalBlock, VarNet
    from deepinv.optim import ADMM, DRS, HQS, PGD, DataFidelity, Prior
    from deepinv.optim.data_fidelity import L2
    from deepinv.optim.optim_iterators import CPIteration, fStep, gStep
    from deepinv.optim.prior import PnP
    from deepinv.unfolded import unfolded_builder
from conversions import FULL, floats_of, relative
from peft import LoraConfig

import lorun_adapt

STAGES = 3
GUIDE = Path(lorun_adapt.__file__).parent / "guides/deepinv.md"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:deepinv", "ignore:rank .* is above the limit")


def denoiser(channels: int = 1) -> nn.Module:
    return deepinv.models.DnCNN(channels, channels, depth=4, nf=8, pretrained=None)


def unfolded(algorithm: type, priors: int) -> nn.Module:
    prior = [PnP(denoiser()) for _ in range(priors)] if priors > 1 else PnP(denoiser())
    settings = {"beta": 1.0} if algorithm in (ADMM, DRS) else {}
    return algorithm(
        data_fidelity=L2(), prior=prior, stepsize=[0.9] * STAGES, sigma_denoiser=[0.05] * STAGES, max_iter=STAGES,
        unfold=True, **settings,
    )  # fmt: skip


class LearnedPrior(Prior):
    def __init__(self) -> None:
        super().__init__()
        self.model = PDNet_PrimalBlock(nf=8)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return self.model(x, w)


class LearnedFidelity(DataFidelity):
    def __init__(self) -> None:
        super().__init__()
        self.model = PDNet_DualBlock(nf=8)

    def forward(self, u: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return self.model(u, w, y)


class Dual(fStep):
    def forward(self, x, w, cur_data_fidelity, y, physics, cur_params):
        return cur_data_fidelity(x, w, y)


class Primal(gStep):
    def forward(self, x, w, cur_prior, cur_params):
        return cur_prior(x, w)


class PrimalDual(CPIteration):
    """An iteration of learned primal-dual: the dual block, then the primal block."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)
        self.f_step, self.g_step = Dual(**settings), Primal(**settings)

    def forward(self, X, cur_data_fidelity, cur_prior, cur_params, y, physics, *args, **kwargs):
        x, _, u = X["est"]
        u = self.f_step(u, physics.A(x[:, 1:2]), cur_data_fidelity, y, physics, cur_params)
        x = self.g_step(x, physics.A_adjoint(u[:, :1]), cur_prior, cur_params)
        return {"est": (x, x, u)}


def learned_primal_dual() -> nn.Module:
    return unfolded_builder(
        iteration=PrimalDual(),
        params_algo={"beta": 0.0},
        data_fidelity=[LearnedFidelity() for _ in range(STAGES)],
        prior=[LearnedPrior() for _ in range(STAGES)],
        max_iter=STAGES,
        custom_init=lambda y, physics: {
            "est": (physics.A_adjoint(y).repeat(1, 5, 1, 1),) * 2 + (torch.zeros_like(y).repeat(1, 5, 1, 1),)
        },
        get_output=lambda X: X["est"][1][:, 1:2],
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[list[str]]]] = {
    f"{algorithm.__name__}, {priors} priors": (
        lambda algorithm=algorithm, priors=priors: unfolded(algorithm, priors),
        [[f"prior.{k if priors > 1 else 0}.denoiser" for k in range(STAGES)]],
    )
    for algorithm in (PGD, HQS, ADMM, DRS)
    for priors in (1, STAGES)
}
NETWORKS["VarNet"] = (lambda: VarNet(denoiser(2), num_cascades=STAGES)), [[f"backbone_net.{k}" for k in range(STAGES)]]
NETWORKS["MoDL"] = (lambda: MoDL(denoiser(2), num_iter=STAGES)), [["prior.0.denoiser"] * STAGES]
NETWORKS["learned primal-dual"] = (
    learned_primal_dual,
    [[f"{name}.{k}" for k in range(STAGES)] for name in ("prior", "data_fidelity")],
)


@pytest.fixture(params=NETWORKS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def made(name: str) -> tuple[nn.Module, Tensor, Tensor, nn.Module]:
    """A network, images, measurements and the physics."""
    torch.manual_seed(0)
    net = NETWORKS[name][0]().eval()
    mask = (torch.rand(1, 1, 8, 8) > 0.5).float()
    if name in ("VarNet", "MoDL"):
        x, physics = torch.rand(4, 2, 8, 8), deepinv.physics.MRI(mask=mask)
    else:
        x, physics = torch.rand(4, 1, 8, 8), deepinv.physics.Inpainting(img_size=(1, 8, 8), mask=mask[0])
    return net, x, physics(x), physics


@torch.no_grad()
def test_converted_as_it_is(name: str, tmp_path: Path) -> None:
    net, _, y, physics = made(name)
    found = lorun_adapt.find_stages(net, example_inputs=(y, physics))
    assert sorted([site.module for site in group.sites] for group in found.groups) == sorted(NETWORKS[name][1])
    expected = net(y, physics)
    tensors = [spec.name for group in found.groups for spec in group.tensors if spec.adaptable]
    config = LoraConfig(r=FULL, lora_alpha=FULL, target_parameters=tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lorun = lorun_adapt.convert(net, config, example_inputs=(y, physics))
    assert relative(lorun(y, physics), expected) < 1e-5
    lorun.save_pretrained(tmp_path / "saved")
    output = lorun(y, physics)
    fresh = made(name)[0]
    for tensor in floats_of(fresh):
        tensor.add_(0.1)
    assert torch.equal(lorun_adapt.from_pretrained(tmp_path / "saved", fresh)(y, physics), output)
    unshared = lorun_adapt.convert(net, rank=2, share=False, example_inputs=(y, physics))
    assert torch.equal(unshared(y, physics), expected)
    for tensor in floats_of(net):
        tensor.add_(1)
    assert torch.equal(unshared(y, physics), expected) and torch.equal(lorun(y, physics), output)


def test_batches_in_its_order_recover_and_fine_tune(name: str) -> None:
    net, x, y, physics = made(name)
    lorun = lorun_adapt.convert(net, rank=1, example_inputs=(y, physics))
    expected = net(y, physics).detach()
    before = relative(lorun(y, physics), expected)
    assert lorun.recover(net, [(x, y, physics)], steps=12)
    assert relative(lorun(y, physics), expected) < 0.9 * before if before else True

    def loss(output: Tensor, batch: tuple[Tensor, Tensor, nn.Module]) -> Tensor:
        assert torch.equal(batch[0], x) and batch[2] is physics
        return (output - batch[0]).square().mean()

    assert lorun.finetune([(x, y, physics)] * 4, "truth", loss=loss, steps=40)
    tuned = loss(lorun(y, physics), (x, y, physics))
    lorun.set_adapter("default")
    assert tuned < loss(lorun(y, physics), (x, y, physics))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", ["PGD, 3 priors", "ADMM, 1 priors", "MoDL", "learned primal-dual"])
def test_its_trainer_trains_step_sizes_too(name: str, share: bool, tmp_path: Path) -> None:
    net, x, y, physics = made(name)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2)

    def converted() -> lorun_adapt.LoRunModel:
        lorun = lorun_adapt.convert(net, rank=1, share=share, example_inputs=(y, physics))
        lorun.add_outside("default", "*params_algo.*")
        return lorun

    def trainer(lorun: lorun_adapt.LoRunModel, **options: object) -> deepinv.Trainer:
        optimizer = torch.optim.Adam([p for p in lorun.parameters() if p.requires_grad], lr=1e-3)
        return deepinv.Trainer(
            model=lorun, physics=physics, losses=deepinv.loss.SupLoss(), optimizer=optimizer, train_dataloader=loader,
            epochs=1, device="cpu", verbose=False, show_progress_bar=False, metrics=deepinv.loss.metric.PSNR(),
            non_blocking_transfers=False, **options,
        )  # fmt: skip

    lorun = converted()
    before = copy.deepcopy(lorun.state_dict())
    trainer(lorun, save_path=tmp_path / "runs").train()
    changed = {key for key, tensor in lorun.state_dict().items() if not torch.equal(tensor, before[key])}
    assert any("stepsize" in key for key in changed) or name == "learned primal-dual"
    assert any(key.startswith("adapters.") for key in changed) and not any(key.startswith("base.") for key in changed)
    output = lorun(y, physics)
    (file,) = (tmp_path / "runs").rglob("ckp_0.pth.tar")
    again = converted()
    assert not torch.equal(again(y, physics), output)
    trainer(again, save_path=None).load_model(file)
    assert torch.equal(again(y, physics), output)
    scores = deepinv.test(
        lorun, loader, physics, metrics=[deepinv.loss.metric.PSNR()], device="cpu", verbose=False,
        show_progress_bar=False,
    )  # fmt: skip
    psnr = -10 * (output.detach() - x).square().mean((1, 2, 3)).log10().mean()
    assert name == "MoDL" or scores["PSNR"] == pytest.approx(float(psnr), abs=0.01)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_guide_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)
    lorun, scores = names["lorun"], names["scores"]
    assert len(blocks) == 4 and len(lorun.outside_of("more")) == len(lorun.outside_of("default")) > 4
    assert scores["PSNR"] > 0


IMAGE = torch.rand(1, 3, 32, 32)
INPAINTING = deepinv.physics.Inpainting(img_size=(3, 32, 32), mask=0.5)


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # SwinIR calls it so
@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: deepinv.models.UNet(3, 3, scales=3), (IMAGE,)),
        (lambda: deepinv.models.DnCNN(3, 3, depth=6, nf=8, pretrained=None), (IMAGE,)),
        (lambda: deepinv.models.DRUNet(3, 3, nc=[8, 16, 32, 64], nb=2, pretrained=None), (IMAGE, 0.1)),
        (lambda: deepinv.models.SRResNet(3, 3), (IMAGE,)),
        (lambda: deepinv.models.Restormer(dim=8, num_blocks=[1, 1, 1, 2], pretrained=None), (IMAGE,)),
        (lambda: swin_transformer([2, 2]), (IMAGE,)),
        (lambda: swin_transformer([2, 2, 2]), (IMAGE,)),
        (lambda: deepinv.models.RAM(pretrained=False), (INPAINTING(IMAGE), INPAINTING)),
    ],
    ids=["UNet", "DnCNN", "DRUNet", "SRResNet", "Restormer", "SwinIR, 2 layers", "SwinIR, 3 layers", "RAM"],
)
def test_a_denoiser_alone_unfolds_nothing(make: Callable[[], nn.Module], inputs: tuple[object, ...]) -> None:
    with pytest.raises(lorun_adapt.LoRunError, match="does not seem to unfold an algorithm.*stages="):
        lorun_adapt.find_stages(make().eval(), example_inputs=inputs)


def swin_transformer(depths: list[int]) -> nn.Module:
    return deepinv.models.SwinIR(
        img_size=32, in_chans=3, embed_dim=12, depths=depths, num_heads=[2] * len(depths), pretrained=None, upsampler=""
    )
