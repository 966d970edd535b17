"""The demo policy `pi05_tiny`: Pi0.5's own code and token layout with small towers.

For machines without the released checkpoint: everything that records, stores or shows attention runs on it.
The trained one fetches the named object of LIBERO's object suite, so its maps mean something; the one with
random weights solves nothing, and its maps mean nothing. Importing this package loads neither torch nor
LeRobot.
"""
