"""Pictures of maps, scores, perplexity and training, the page of a sweep, and progress in the terminal.

Public: `map.draw_map` and `.map_svg`, `heatmap.draw_scores`, `curves.draw_perplexity` and `.draw_training` (each draws
a `picture.Picture`), `page.page`, `progress`. Colours and type are `style`'s, those of the page's text in its template.
"""
