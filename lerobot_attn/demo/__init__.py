"""Demo policies: LeRobot's own code and token layouts with small towers.

For machines without the released checkpoints: everything that records, stores or shows attention runs on
them. `pi05_tiny` comes trained: it fetches the named object of LIBERO's object suite, so its maps mean
something. `pi0_tiny`, `smolvla_tiny`, and `pi05_tiny` where that is asked for, have random weights: they
solve nothing, and their maps mean nothing. Importing this package loads neither torch nor LeRobot.
"""
