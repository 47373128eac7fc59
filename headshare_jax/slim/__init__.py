"""Slimming: units keep fewer columns of values and outputs, and fewer rotary pairs of queries and keys.

Public: `rounds.slim` and `SlimSettings`; `choose.Rules`.
"""
