"""Watching a model route: load per expert, its health, and the pages and lines that show it.

load: what one step's routing looked like | recorder: listens to routing (needs torch) | health: judges loads (numpy)
report_data, report, plots: a self-contained HTML page | live: the terminal while training
"""
