"""Task file for the published ISTA-Net+ (Zhang and Ghanem, arXiv:1706.07929).

The weights and matrices are the authors'. Put them into one folder, and set the environment variable to it:

    export ISTA_NET_PLUS=.../cs25      # net_params_200.pkl, phi_0_25_1089.mat, Initialization_Matrix_25.mat
    lorun-adapt inspect examples/ista_net_plus.py

The network restores each block of 33x33 pixels by itself. Its kernels are plain parameters, not convolution
layers, and its checkpoint was saved through ``nn.DataParallel``.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import scipy.io
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 33
FOLDER = os.environ.get("ISTA_NET_PLUS")

channels = 1
patch = BLOCK
tile = BLOCK  # blocks are restored one by one
weights = str(Path(FOLDER, "net_params_200.pkl").resolve()) if FOLDER else None


class BasicBlock(nn.Module):
    """One stage, with the parameter names of the published checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.lambda_step = nn.Parameter(torch.tensor([0.5]))
        self.soft_thr = nn.Parameter(torch.tensor([0.01]))
        self.conv_D = _kernel(32, 1)
        self.conv1_forward = _kernel(32, 32)
        self.conv2_forward = _kernel(32, 32)
        self.conv1_backward = _kernel(32, 32)
        self.conv2_backward = _kernel(32, 32)
        self.conv_G = _kernel(1, 32)

    def forward(self, x: Tensor, gram: Tensor, back_projection: Tensor) -> tuple[Tensor, Tensor | None]:
        x = x - self.lambda_step * (x @ gram) + self.lambda_step * back_projection
        restored, residual = self.proximal_mapping(x.view(-1, 1, BLOCK, BLOCK))
        return restored.view(-1, BLOCK * BLOCK), residual

    def proximal_mapping(self, r: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (b, 1, H, W) -> denoised images, symmetry residual."""
        d = F.conv2d(r, self.conv_D, padding=1)
        code = F.conv2d(F.relu(F.conv2d(d, self.conv1_forward, padding=1)), self.conv2_forward, padding=1)
        sparse = code.sign() * F.relu(code.abs() - self.soft_thr)
        restored = r + F.conv2d(self._backward(sparse), self.conv_G, padding=1)
        # The symmetry loss is needed only in training, and would make a forward half as long again.
        return restored, self._backward(code) - d if self.training else None

    def _backward(self, code: Tensor) -> Tensor:
        return F.conv2d(F.relu(F.conv2d(code, self.conv1_backward, padding=1)), self.conv2_backward, padding=1)


class ISTANetPlus(nn.Module):
    """``forward(y, phi, q)``: measurements (b, m), phi (m, 1089), q (1089, m) -> blocks (b, 1089), residuals."""

    def __init__(self, stages: int = 9) -> None:
        super().__init__()
        self.fcs = nn.ModuleList(BasicBlock() for _ in range(stages))

    def forward(self, y: Tensor, phi: Tensor, q: Tensor) -> list[Tensor | list[Tensor | None]]:
        gram, back_projection = phi.T @ phi, y @ phi
        x = y @ q.T
        symmetry = []
        for block in self.fcs:
            x, residual = block(x, gram, back_projection)
            symmetry.append(residual)
        return [x, symmetry]


def _kernel(out_channels: int, in_channels: int) -> nn.Parameter:
    return nn.Parameter(nn.init.xavier_normal_(torch.empty(out_channels, in_channels, 3, 3)))


@functools.cache
def matrices() -> tuple[Tensor, Tensor]:
    """The sampling matrix (m, 1089) and the initialisation matrix (1089, m)."""
    if not FOLDER:
        raise RuntimeError("set ISTA_NET_PLUS to the folder with the authors' weights and matrices")
    (phi,), (q,) = Path(FOLDER).glob("phi_*.mat"), Path(FOLDER).glob("Initialization_Matrix_*.mat")
    return (
        torch.from_numpy(scipy.io.loadmat(phi)["phi"]).float(),
        torch.from_numpy(scipy.io.loadmat(q)["Qinit"]).float(),
    )


def build() -> nn.Module:
    return ISTANetPlus()


def measure(images: Tensor, sigma: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    phi, q = matrices()
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % BLOCK, 0, -height % BLOCK))
    blocks = F.unfold(padded, BLOCK, stride=BLOCK).transpose(1, 2).reshape(-1, BLOCK * BLOCK)
    y = blocks @ phi.T
    return y + sigma / 255 * torch.randn_like(y), phi, q


def restore(output: list[Tensor], images: Tensor) -> Tensor:
    batch, _, height, width = images.shape
    padded = (height + -height % BLOCK, width + -width % BLOCK)
    blocks = output[0].reshape(batch, -1, BLOCK * BLOCK).transpose(1, 2)
    return F.fold(blocks, padded, BLOCK, stride=BLOCK)[..., :height, :width].clamp(0, 1)
