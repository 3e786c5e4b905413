"""What people write about these models, checked: each with the formula, the numbers and a verdict. No torch here.

claim: what a claim is | capacity: what fits | speed, worth: how fast and how good | page: all of it as Markdown
"""

from moesaic.plan.claims.claim import Claim, Verdict
from moesaic.plan.claims.page import all_claims, page

__all__ = ["Claim", "Verdict", "all_claims", "page"]
