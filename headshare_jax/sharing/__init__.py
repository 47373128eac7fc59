"""Sharing as data: maps, their JSON, how they are chosen from scores, sources and views of weights, and the ledger.

Knows neither models nor files. Public: `map.SharingMap`, `tie.check_tie`, `scores.MatchResult`, `choose.sharing_map`
and `drop_map`, `budget.budget_map`, `source.WeightSource` and `fingerprint`, `view.SharedView` and the other views,
`ledger.ledger`.
"""
