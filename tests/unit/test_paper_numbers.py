"""Every number that recipes, documentation and notebooks give as a paper's is in `docs/paper_numbers.json`."""

import re

import pytest
from paper_claims import NUMBERS, PAPERS, RECIPES, claims, same, tagged_lines

from qlora_neft import load_recipe

CLAIMS = list(claims())
# Numbers of ours beside a citation, by page: what they are.
OURS = {}


def test_a_claim_is_in_the_table_it_cites():
    wrong = [claim for claim in CLAIMS if not claim.is_listed and claim.number not in OURS.get(claim.page, {})]
    assert not wrong, "\n".join(f"{claim.page}: {claim.number} in: {claim.text[:200]}" for claim in wrong)


def test_there_are_claims_and_no_exception_is_left_over():
    assert len(CLAIMS) > 100
    for page, numbers in OURS.items():
        unlisted = {claim.number for claim in CLAIMS if claim.page == page and not claim.is_listed}
        assert set(numbers) == unlisted, page
