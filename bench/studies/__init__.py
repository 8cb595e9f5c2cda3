"""Train small models: ``demo`` with our AdamW beside torch's, ``formats`` with each way to keep the moments."""
