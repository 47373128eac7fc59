"""Methods: each makes a smaller model and its map of a dense model, for a ratio or a budget.

Public: `table.METHODS` and `find`; `work.Work`, `MethodSettings`, `Amount` and `Made`; the kinds, `scored.ScoredMethod`
(score, choose, perhaps refit) and `slimming.SlimMethod`.
"""
