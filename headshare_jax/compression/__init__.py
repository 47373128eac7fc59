"""From a model to a smaller one in one call.

Public: `compress.compress`, `record.Compressed`; `texts` (calibrated and measured on), `effort` (what it takes).
"""
