"""A saved converted network as a folder of files: saving, loading, and the cards that describe it.

``layout.py`` names every file; start with ``save.py`` and ``load.py``. May import ``peft_format``, and what this may
import.
"""
