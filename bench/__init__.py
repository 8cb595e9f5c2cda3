"""What fused_adamw gains: ``python -m bench demo`` trains a model, ``python -m bench step`` times optimizer steps."""
