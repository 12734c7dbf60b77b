"""Time and size of a converted network beside what people would use instead.

Imports what is above training, but not the command line.
"""
