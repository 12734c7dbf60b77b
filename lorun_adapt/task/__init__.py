"""What ties a network to images: task files, reading images and weights, crops to train on, PSNR and SSIM.

May import everything from ``training`` and ``hub`` down, but neither ``model``, ``conversion`` nor ``cli``.
"""
