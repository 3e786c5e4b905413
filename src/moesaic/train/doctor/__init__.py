"""The doctor: looks at a run's routing, says what is ill, and with leave mends it. It never acts at inference.

findings: what is ill (numpy) | surgery: rows of a model and of its optimizer that change together, and can be put back
remedies: what is done about a finding | split: one expert's tokens shared by two | doctor: when, and whether it helped
"""

from moesaic.train.doctor.doctor import Doctor, DoctorSettings, check_treatable
from moesaic.train.doctor.findings import Finding, findings_in

__all__ = ["Doctor", "DoctorSettings", "Finding", "check_treatable", "findings_in"]
