"""The demo policy `pi05_tiny`: Pi0.5's own code and token layout with small, random towers.

For machines without the released checkpoint: everything that records, stores or shows attention runs on it.
Its weights are random, so its maps mean nothing. Importing this package loads neither torch nor LeRobot.
"""
