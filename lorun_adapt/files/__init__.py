"""Saved folders: writing and reading a converted network, and its model cards.

``layout.py`` lists every file name; start with ``save.py`` and ``load.py``. May import ``peft_format`` and everything
below it.
"""
