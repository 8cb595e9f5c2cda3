"""Measure what fused_adamw gains: ``step`` times optimizer steps, ``host`` their host time, ``limit`` memory's speed,
``report`` makes a table of several runs, ``picture`` draws the tables of the docs, ``demo`` trains a model, ``paper``
redoes the paper's experiments."""
