"""Measuring a model: perplexity, and the tasks of lm-eval.

Public: `perplexity.perplexity` and `Perplexity`, `harness.run_tasks`.
"""
