"""Steps compiled for a machine that is not at hand: whether they fit, what they cost, and what bounds them.

Plans decoding and prompts as well as training. Public: `planning.plan`, `estimate.Workload`, `topology.chip_of`,
`footprint.footprint`.
"""
