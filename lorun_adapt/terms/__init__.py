"""What a stage adds to the shared base for one tensor; a new kind of adapter is a new file here.

``lowrank.py`` is the low-rank term, ``factors.py`` its linear algebra. May import ``stages``, ``disk``, ``util`` and
``errors``.
"""
