"""Simulates clusters of devices that train an MoE or serve it, from events; no torch here.

loads: how unevenly experts are chosen | placed: experts on ranks | unit: what a step takes | events: the clock
troubles: failures and slow devices | requests, serving, outcome: two pools | schedules, training: one step
"""
