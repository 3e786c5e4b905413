"""Lint: other people's set-ups, checked by experiment (`moesaic.lint`).

report: what was found | blocks: the experts and routers of any model | setups, trainer, recipe: what a set-up is: a
loop of one's own, a transformers Trainer, a moesaic recipe | stand: experiments with dictated routing | patterns: that
routing | processes: the same over ranks | checks: the list, filled by load, scale, selection and learning | suite: all
"""

from moesaic.train.lint.report import Finding, Report
from moesaic.train.lint.setups import OwnLoop, SetUp
from moesaic.train.lint.suite import lint

__all__ = ["Finding", "OwnLoop", "Report", "SetUp", "lint"]
