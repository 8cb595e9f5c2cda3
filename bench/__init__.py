"""What fused_adamw gains: ``step`` times optimizer steps, ``host`` their host time, ``limit`` the memory beside a step,
``report`` makes a table of several runs, ``demo`` trains a model, ``paper`` redoes the paper's experiments."""
