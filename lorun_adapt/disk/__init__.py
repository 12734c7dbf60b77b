"""Reading files within bounds, and writing folders that appear whole or not at all.

May import ``util`` and ``errors``.
"""
