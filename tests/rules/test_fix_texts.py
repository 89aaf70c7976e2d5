"""What a finding says about its fix: what a repair for this model and this target does, and nothing else."""

from __future__ import annotations

from bnbfix.rules.rule import Code
from tests.support.build import Make, scan

ADDS_V = "v_proj.weight and its quant-state tensors are added, exact copies of k_proj's."
DEQUANTIZES_K = (
    "q and k of these layers are dequantized and skipped, since some release of the target refuses a v_proj."
)


def fixes(pristine: Make, family: str, quant: str, target: str, code: Code) -> set[str | None]:
    found = {f.fix for f in scan(pristine(family, quant), target).findings if f.code is code}
    assert found
    return found


def test_the_fix_of_a_missing_v_is_the_one_for_the_target(pristine: Make) -> None:
    assert fixes(pristine, "dense31b", "skip", "0.22.1", Code.K_EQ_V_WITHOUT_V) == {ADDS_V}
    assert fixes(pristine, "dense31b", "skip", "portable", Code.K_EQ_V_WITHOUT_V) == {DEQUANTIZES_K}


def test_only_the_fixes_of_a_mixture_of_experts_mention_experts(pristine: Make) -> None:
    for code in (Code.UNQUANTIZED_IN_QUANTIZED, Code.PARTIALLY_QUANTIZED):
        (dense,) = fixes(pristine, "dense31b", "partial", "0.32.0", code)
        (experts,) = fixes(pristine, "moe26b", "partial", "0.32.0", code)
        assert dense and experts
        assert "expert" not in dense.lower()
        assert "expert" in experts.lower()
