"""What a run says at its end: the commands it names can be run as they stand."""

from pathlib import Path

import pytest

from qlora_neft.display.console import lines_after


@pytest.mark.parametrize(
    ("base", "asks_for_the_base"),
    [("huggyllama/llama-7b", False), ("bundled:demo/base", True), ("/models/llama", True), ("./llama", True)],
)
def test_export_of_a_local_base_asks_for_its_hub_id(base, asks_for_the_base):
    lines = lines_after(Path("out"), base, 3, 1.0, drawn=True)
    [export] = [line for line in lines if "qlora-neft export out --repo-id" in line]
    assert ("--base-id" in export) == asks_for_the_base


def test_the_merge_is_named_for_programs_that_load_the_whole_base():
    lines = {of: lines_after(Path("out"), "a/b", 3, 1.0, drawn=True, of_text_part=of) for of in (False, True)}
    [[plain], [whole]] = [[line for line in lines[of] if "qlora-neft merge out" in line] for of in (False, True)]
    assert "whole base" in whole and "whole base" not in plain
