"""The Hugging Face Hub: uploading and downloading converted networks, and resolving a source to a folder.

Start with ``transfer.py``. May import ``factorise``, ``files`` and everything below them.
"""
