"""Watching a model route: load per expert, its health, and the pages and lines that show it.

load: what one step's routing looked like | recorder, logits: listen to routing (torch) | probe: asks experts (torch)
health: judges loads | states: dead, cold, oversized | likeness: duplicates, experts that work together | drift:
steadiness (numpy, all four) | engine: the same of serving
report_data, report, plots: a self-contained HTML page | live: the terminal while training | tensorboard, prometheus
"""
