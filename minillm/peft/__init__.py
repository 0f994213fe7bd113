"""A few new parameters adapt a model: LoRA and its kin, put into the one model from outside."""
