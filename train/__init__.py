"""PostShare: training a model so that its heads can share weights, on one device or many hosts.

Public: `loop.run`, `recipe.load` and `Recipe`, `step.make_step`, `losses.similarity_penalty`.
"""
