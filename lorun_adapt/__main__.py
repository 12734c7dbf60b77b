"""``python -m lorun_adapt`` is ``lorun-adapt``."""

from .cli import main

main()
