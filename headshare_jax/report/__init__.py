"""Pictures and the page of a sweep.

Public: `pictures`, `page.page`.
"""
