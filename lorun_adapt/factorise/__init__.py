"""From the tensors of N trained stages to one shared base and a low-rank term for each stage.

Start with ``plan.py``, which chooses the tensors and their ranks. May import ``peft_format``, and what this may import.
"""
