"""Converted networks on the Hugging Face Hub: upload, download, and finding where a source is.

Start with ``transfer.py``. May import ``factorise``, ``files``, and what these may import.
"""
