"""Networks in files that run without this package: programs of ``torch.export``, and ONNX.

Imports what is above training, but neither the benchmarks nor the command line.
"""
