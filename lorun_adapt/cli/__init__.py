"""The command ``lorun-adapt``: inspect, convert, recover, finetune, eval, report, demo, push, pull and list.

``main.py`` collects the commands. May import every other folder.
"""
