"""Helpers that know nothing of conversion: modules, nested values, seeds, numbers, tables, text, a toy network.

The lowest floor: it imports nothing of this package but ``errors``.
"""
