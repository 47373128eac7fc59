"""Fitting a shared model to its dense one in closed form, and the table of methods.

Public: `refit.refit`, `RefitSettings` and `RefitReport`, `methods.METHODS`.
"""
