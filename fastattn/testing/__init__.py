"""The correctness harness: random awkward problems, a float64 oracle, poisoned buffers, and a report.

``fastattn verify`` runs it from the command line. In a test of a kernel of your own::

    from fastattn.testing import verify

    def test_my_kernel():
        verify("my_module:my_attention", n=100).raise_on_failure()

`cases` describes problems, `oracle` solves them, `compare` says how much error is allowed, `checks` runs everything on
one case, `runner` on many, `adapters` explains which functions can be judged.
"""

from fastattn.testing.adapters import Target, function_target
from fastattn.testing.cases import (
    AdditiveCase,
    Case,
    LossCase,
    TermSpec,
    WeightsCase,
    build_problem,
    random_additive_case,
    random_cases,
    random_loss_cases,
    random_weights_cases,
)
from fastattn.testing.checks import (
    Check,
    check_additive,
    check_attention,
    check_loss,
    check_weights,
    poisoned_buffers,
    same_bits,
)
from fastattn.testing.report import Report
from fastattn.testing.runner import verify

__all__ = [
    "AdditiveCase",
    "Case",
    "Check",
    "LossCase",
    "Report",
    "Target",
    "TermSpec",
    "WeightsCase",
    "build_problem",
    "check_additive",
    "check_attention",
    "check_loss",
    "check_weights",
    "function_target",
    "poisoned_buffers",
    "random_additive_case",
    "random_cases",
    "random_loss_cases",
    "random_weights_cases",
    "same_bits",
    "verify",
]
