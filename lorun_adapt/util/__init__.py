"""Helpers that know nothing of unfolding networks: modules, nested values, seeds, numbers, tables and text.

The lowest floor: it imports nothing of this package but ``errors``.
"""
