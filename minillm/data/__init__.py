"""What a model is fed: corpora, cleaning, de-duplication, shards, batches and mixtures."""
