"""Training of converted networks: recovery of the quality, and fine-tuning of new adapter sets.

Start with ``recovery.py`` and ``finetune.py``; both train with ``trainer.py``. May import ``factorise``, ``files``, and
what these may import.
"""
