"""The converted network that users work with: storing, swapping and combining adapter sets, choosing by noise level.

Start with ``lorun_model.py``. May import ``task`` and everything below it.
"""
