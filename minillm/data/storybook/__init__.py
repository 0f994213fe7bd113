"""The story grammar: an engine with exact probabilities, a cast, and four plots."""
