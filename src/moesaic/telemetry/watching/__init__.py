"""A run followed from its files: `moesaic watch` and `moesaic train --watch`.

follower: new lines of a file that is being written | progress: a run's lines as curves that stay short | run: all that
a run's folder says now | server: a page on this machine alone that asks for it
"""
