"""How a network with a shared base and adapters is put together, run and observed.

Start with ``converted.py``, the data of a converted network, and ``assemble.py``, which makes a network of it. May
import ``terms``, ``stages``, ``disk``, ``util`` and ``errors``.
"""
