"""The converted network that users hold: its adapter sets, swapping and combining them, choosing them by noise level.

Start with ``lorun_model.py``. May import ``task``, and what this may import.
"""
