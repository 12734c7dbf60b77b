"""``python -m lorun_adapt`` is ``lorun-adapt``."""

from .cli.main import main

main()
