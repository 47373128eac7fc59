"""The decoder: one layer that everything runs, how its weights are read, the model, its cache, and generation.

Public: `llama.Llama`, `share.share` and `unshare`, `generate.generate` and `Sampling`, `cache.KVCache`,
`mesh.make_mesh`, `place.place`; for those who run layers themselves, `layer` (the two blocks) and `reading` (how
weights are read).
"""
