"""minillm: a small but complete language-model package, written to be read.

Every lecture of the course imports it. Subpackages only import downward: config and accounting
know no tensors, the model knows neither training nor parallelism, and so on up to `teach`, which
only notebooks use.
"""
