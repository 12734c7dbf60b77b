"""PEFT's configs and adapter files: what PEFT can represent, how it is written, and how it is read.

Start with ``writer.py`` and ``reader.py``. May import ``network``, and what this may import.
"""
