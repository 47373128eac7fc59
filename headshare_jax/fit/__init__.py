"""Fitting a shared model to its dense one in closed form.

Public: `refit.refit`, `RefitSettings` and `RefitReport`.
"""
