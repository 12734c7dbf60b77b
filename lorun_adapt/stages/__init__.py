"""Which modules of a network are its stages, which tensors they have, and whether they can be shared.

May import ``util`` and ``errors``.
"""
