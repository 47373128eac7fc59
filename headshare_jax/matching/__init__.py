"""Match scores: how alike two units are, by the cosine of their weights or by what they compute on a text.

Public: `cosine.match`, `functional.match_functional` and `FunctionalSettings`.
"""
