"""Calibration text, run through a model block by block from any source, and what its predictions depend on.

Stands below matching and fitting, which both walk it. Public: `windows.calibration_windows`, `own_text.own_text` (text
that the model writes itself), `overlap.TextRuns` (whether another text was in it), `streams` (the walk),
`fisher.attention_gradients`, `journal.Journal` (what long work keeps of itself).
"""
