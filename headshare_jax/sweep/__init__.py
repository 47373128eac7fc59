"""Methods of sharing measured side by side, each point kept as soon as it is there.

Public: `points.Measurements`, `folder.SweepFolder`.
"""
